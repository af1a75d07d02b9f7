"""What the training source says, read with the syntax tree and never imported."""
