"""Benchmarks → tables and figures."""
