"""What the data and torch agree on: batches, plans, the score table, masks."""

# Slots of a side of FlexAttention's blocks, which Rust counts.
BLOCK = 128
