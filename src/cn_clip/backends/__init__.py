"""What runs a model: each file makes one kind of Embedder, and only it imports its runtime."""
