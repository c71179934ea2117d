"""Accuracy: task generators, readers of published data sets, metrics, and a runner that puts methods side by side."""
