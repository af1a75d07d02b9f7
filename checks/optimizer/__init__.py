"""Checks on the optimizer."""
