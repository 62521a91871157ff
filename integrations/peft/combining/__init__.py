"""Several adapters made one: of a model, or of directories."""
