"""The nouns of Farflung: frozen values, their units and their errors. No I/O, no torch."""
