"""Data from Arrow shards on disk to a `Batch` on the CPU."""
