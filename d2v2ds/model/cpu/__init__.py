"""Kernels for training on a CPU; accelerators run the plain operators of torch."""
