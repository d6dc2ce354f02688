"""Fine-tuning tasks: a head on the trunk, its labels, loss and metrics, behind the protocol `Objective`."""
