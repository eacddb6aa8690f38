"""The torch half: score table, log-probs, losses, loader. Everything here needs torch; nothing needs a GPU."""
