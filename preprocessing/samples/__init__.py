"""Small corpora made on this machine, for demonstrations and tests."""
