"""What a run optimises: losses, targets and the teacher's network."""
