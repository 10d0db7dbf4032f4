"""Calibration of cosines: fit, thresholds, report."""
