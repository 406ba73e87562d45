"""What a run saves, and opening it for use."""
