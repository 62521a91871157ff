"""The adapted layers: one class a kind, their weights, what they share, merging."""
