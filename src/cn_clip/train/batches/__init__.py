"""What a training step takes: batches, cached image features, text targets."""
