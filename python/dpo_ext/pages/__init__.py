"""Self-contained HTML, for the demo, the bench and notebooks."""
