"""Trained policies: used, saved, evaluated and rendered."""
