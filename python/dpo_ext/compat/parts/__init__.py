"""What the replacements of several code bases are made of."""
