"""Configs: loaded with the line of every key, and what their keys mean."""
