"""Checks on the config."""
