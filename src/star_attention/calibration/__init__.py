"""Calibration: which layers of a model should look back, measured on facts planted in a text."""
