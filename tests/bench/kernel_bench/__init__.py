"""The parts of `bench_kernels.py`: how it measures, and the two losses beside their peers."""
