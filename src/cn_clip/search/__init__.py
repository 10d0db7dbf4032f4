"""Search of a library of images."""
