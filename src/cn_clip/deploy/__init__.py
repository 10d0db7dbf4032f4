"""The official export script, under its official module path."""
