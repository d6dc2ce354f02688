"""Features of raw inputs and of packed folders from an exported model."""
