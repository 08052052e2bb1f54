"""The parts of `bench_data.py`: contenders side by side, one section a module."""
