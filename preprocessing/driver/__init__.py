"""The order of a packing, for every modality: scan, plan, pack shards, finish."""
