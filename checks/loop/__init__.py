"""Checks on the loop."""
