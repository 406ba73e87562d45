"""The paper beside ours: its tables with its printed rows, its figures, and the card of a model."""
