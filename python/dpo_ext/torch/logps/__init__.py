"""Log-probs from logits and from hidden states."""
