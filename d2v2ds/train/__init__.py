"""Training step, loop, schedules, metrics and guards."""
