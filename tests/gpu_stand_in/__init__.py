"""A stand-in for a GPU: see README.md."""
