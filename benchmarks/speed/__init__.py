"""What adapters cost in time and memory, beside LoRA and its kin. `python -m benchmarks.speed --help`."""
