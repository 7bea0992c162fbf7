"""Who should compute what: coverage, placement and routes. Pure functions of values; no I/O, no torch."""
