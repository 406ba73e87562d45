"""Data: the built-in scenes, readers of the published formats, transforms, and the Grain pipeline."""
