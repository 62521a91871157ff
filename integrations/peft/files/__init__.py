"""Adapter directories and base models as files, read and written without a model in memory."""
