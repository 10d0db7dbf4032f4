"""Checks, near-duplicates and decontamination of a dataset."""
