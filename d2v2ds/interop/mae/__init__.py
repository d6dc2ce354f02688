"""Checkpoints of the official MAE repository, and of transformers' ViTMAE, in and out."""
