"""Training data: sources, curation, packing and loading."""
