"""Folders of models that transformers has itself, such as data2vec 1.0: read and written without transformers."""
