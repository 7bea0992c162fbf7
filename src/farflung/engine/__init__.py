"""Computes a range of decoder layers for many sessions at once."""
