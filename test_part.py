"""The market pipeline as a whole."""
