"""Texts to rows of text shards."""
