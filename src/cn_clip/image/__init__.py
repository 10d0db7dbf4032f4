"""Decoding of images within limits, and the preprocessing of the published weights."""
