"""Does it learn as well, with fewer parameters? Every method with a learning-rate sweep and three seeds of its own.

`python -m benchmarks.quality --help`; what came out stands in docs/quality.md.
"""
