"""Emulated and simulated networks, virtual time, benchmarks."""
