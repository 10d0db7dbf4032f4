"""Training batches: order, augmentation, loading."""
