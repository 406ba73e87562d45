"""Configurations of the four stages and of the quickstart; `get_config(size)` in each file."""
