"""Trained versions: what is known of one, the gate, the store, and ``python -m lib.versions``."""
