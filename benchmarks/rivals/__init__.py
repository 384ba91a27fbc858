"""Rivals, each in an environment of its own: `python -m benchmarks.rivals.run bergson`."""
