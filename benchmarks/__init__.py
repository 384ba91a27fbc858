"""Races of the reference, ourselves and rivals on named shapes: `python -m benchmarks.verify <op>`."""
