"""Everything around the training loop of one run: preparation, provenance, locks, signals and restarts."""
