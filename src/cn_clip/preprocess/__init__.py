"""The official preprocessing scripts, under their official module paths."""
