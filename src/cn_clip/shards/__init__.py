"""Folders of embedding shards, of any size: search, duplicates, filters."""
