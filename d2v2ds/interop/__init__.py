"""Names and files of other implementations, as tables."""
