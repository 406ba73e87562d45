"""Losses of all stages."""
