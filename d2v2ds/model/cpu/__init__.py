"""Kernels for training on a CPU; on an accelerator the plain operators of torch run."""
