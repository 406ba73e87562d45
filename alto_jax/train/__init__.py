"""The one loop of all stages."""
