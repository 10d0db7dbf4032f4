"""Training data: any source of pairs in, proven clean, in the same order everywhere."""
