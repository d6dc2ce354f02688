"""The configuration of a run: its schema, how a YAML file is loaded, and what it amounts to."""
