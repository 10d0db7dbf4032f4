"""Inputs of a training step: batches, cached image features, text targets."""
