"""Calibration: which layers of a model need other blocks, measured on facts planted in a text."""
