"""What adapters learn on sentences and on images: runs of seconds, so that the whole field is compared.

`python -m benchmarks.tracks --help`
"""
