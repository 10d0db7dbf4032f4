"""The towers and the model that joins them, under the official state-dict names."""
