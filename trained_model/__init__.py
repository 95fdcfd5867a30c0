"""Trained models: read from a folder or the Hub, strictly, and run on binned cells."""
