"""Unpaired data: where the two domains come from."""
