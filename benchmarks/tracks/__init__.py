"""Which method for which budget? The whole field on small real tasks, each at its best learning rate, five seeds; and
reinforcement learning with a few.

`python -m benchmarks.tracks --help`; what came out stands in docs/evidence.md.
"""
