"""Files that make an export folder load with transformers."""
