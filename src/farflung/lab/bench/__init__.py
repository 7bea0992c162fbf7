"""Benchmark suites over the emulated network: real processes, every result beside its floor."""
