"""Files put on the path of a watched interpreter."""
