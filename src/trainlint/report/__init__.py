"""Renderers of the report model: they compute nothing."""
