"""Features of a trained encoder and the probes that judge them."""
