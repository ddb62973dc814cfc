"""The op on the Triton kernels."""
