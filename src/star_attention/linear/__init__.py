"""Linear layers whose weights are in fp8, and their kernels."""
