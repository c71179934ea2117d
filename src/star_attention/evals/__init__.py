"""Accuracy: suites of tasks, readers of data sets, metrics, runs and reports."""
