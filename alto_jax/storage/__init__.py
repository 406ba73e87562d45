"""Runs and data in buckets: every room works on this machine's files, which this one fetches and mirrors."""
