"""Adapter directories, read and written without a model: their format, checks, exports, merging, model cards."""
