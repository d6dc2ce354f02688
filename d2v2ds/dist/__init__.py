"""Ranks, engines, the sharded teacher and checkpoints: the only room that imports DeepSpeed."""
