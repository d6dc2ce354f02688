"""Comparison of the model with golden vectors of the official implementation."""
