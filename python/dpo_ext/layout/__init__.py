"""What the data and torch agree on: batches, plans, the score table, masks."""
