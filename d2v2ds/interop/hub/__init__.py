"""What an export folder needs to load with transformers."""
