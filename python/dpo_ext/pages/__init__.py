"""Self-contained HTML, for the demo and the bench."""
