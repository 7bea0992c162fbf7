"""Farflung runs language models too big for any one machine across far-flung ones."""

__version__ = "0.1.0"
