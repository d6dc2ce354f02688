"""data2vec 1.0 checkpoints of images: fairseq, the fork of BEiT with the published models, and transformers."""
