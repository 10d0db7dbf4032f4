"""Recipes: schema, TOML, checks, flags, and the shipped recipes."""
