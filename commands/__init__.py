"""The command line `ndlora`, above the core and the integrations."""
