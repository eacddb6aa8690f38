"""The losses, and the calls that take log-probs."""
