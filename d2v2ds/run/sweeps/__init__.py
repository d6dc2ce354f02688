"""Sweeps: many runs that differ in switches and seeds, scored and compared; see `d2v2ds.sweep`."""
