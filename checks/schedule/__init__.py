"""Checks on the schedule."""
