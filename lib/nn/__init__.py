"""Losses and injected modules; torch only."""
