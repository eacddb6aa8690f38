"""What is kept on disk, one state of a folder at a time."""
