"""The pretraining step, the loop around it, schedules, metrics and guards."""
