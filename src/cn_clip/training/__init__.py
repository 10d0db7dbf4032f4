"""The official training script, under its official module path."""
