"""Frames of a CTC recogniser -> words: alignments, and beam search with a lexicon and an n-gram model."""
