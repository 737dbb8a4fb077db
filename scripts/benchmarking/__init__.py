"""The parts of `scripts/bench_kernels.py`, one idea a file."""
