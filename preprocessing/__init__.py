"""Raw corpora to Arrow shards. Runs on a CPU node without torch."""
