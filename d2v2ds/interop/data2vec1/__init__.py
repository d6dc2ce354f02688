"""data2vec 1.0 checkpoints of fairseq and of transformers."""
