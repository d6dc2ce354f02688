"""Comparison of fine-tuning, decoding and scores with golden vectors of the official implementation."""
