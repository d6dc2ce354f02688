"""Networks of data2vec 2.0 in plain PyTorch: no files, no ranks, no DeepSpeed."""
