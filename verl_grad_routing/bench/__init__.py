"""Benchmarks: how much routing costs, measured in interleaved runs with an interval."""
