"""Features of a trained encoder, and probes on them."""
