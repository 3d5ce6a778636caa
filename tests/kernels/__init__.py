"""Other kernels than this machine's, as guests of qemu: `python -m tests.kernels`."""
