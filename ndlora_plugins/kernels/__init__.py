"""The fast products of the structures: `fused.Product`s in torch, and in Triton for single devices.

Nothing imports `triton_modes` unless it is switched on.
"""
