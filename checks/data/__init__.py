"""Data: what the loaders deliver, and whether samples stay apart."""
