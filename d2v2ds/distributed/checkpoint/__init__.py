"""Checkpoints of a sharded run: the format, saving, loading, and which ones are kept."""
