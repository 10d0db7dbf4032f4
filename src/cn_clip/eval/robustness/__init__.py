"""Recall on rewritten queries."""
