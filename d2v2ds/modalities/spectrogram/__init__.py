"""Spectrograms of recordings: the audio line that descends from data2vec 2.0 (EAT, arXiv 2401.03497)."""
