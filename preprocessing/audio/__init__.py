"""Recordings to rows of audio shards."""
