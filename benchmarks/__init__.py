"""Benchmarks: one script per claim. Each prints one table and writes the same numbers as JSON to benchmarks/results."""
