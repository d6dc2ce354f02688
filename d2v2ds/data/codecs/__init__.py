"""Encoded bytes to samples and pixels. No torch."""
