"""Putting adapters into a model: what is adapted, planned and checked, and the model that holds them."""
