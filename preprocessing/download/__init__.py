"""Corpora from the web, resumed and checked."""
