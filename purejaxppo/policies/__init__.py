"""Trained policies: use, files, evaluation and rendering."""
