"""Checkpoint files read from outside the program. Empty so far: loads are only seen in the watched run."""
