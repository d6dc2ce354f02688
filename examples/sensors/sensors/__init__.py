"""Multi-channel time series for d2v2ds: EEG, accelerometers and the like."""
