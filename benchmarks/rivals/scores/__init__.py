"""Scores of rivals on a case on disk: `python -m benchmarks.rivals.score CASE --rivals kronfluence --out DIR`."""
