"""Doors for code that cannot be launched as a program."""
