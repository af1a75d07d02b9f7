"""Numbers: update sizes, rounding, loss scale, activations, values that are not finite."""
