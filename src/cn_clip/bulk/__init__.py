"""Embeddings of any number of images on any number of machines, each shard exactly once."""
