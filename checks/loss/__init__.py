"""Losses: what reaches them, and what they count."""
