"""Decoders of encoded bytes to samples and pixels. No torch."""
