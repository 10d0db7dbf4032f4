"""Embeddings of many images or texts: inputs, files, resumable extraction."""
