"""Checksums, durable files and safetensors files. Imports nothing of the project but its errors."""
