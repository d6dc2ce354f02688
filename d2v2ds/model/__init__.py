"""The data2vec 2.0 networks in plain PyTorch: no files, no ranks, no DeepSpeed."""
