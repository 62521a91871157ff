"""NdLinear-LoRA: dW = sum_t kron(W_1[t], ..., W_N[t]), applied mode by mode.

Source: arXiv 2503.17353; https://github.com/ensemble-core/NdLinear-LoRA (`NdLinearLoRA`), there with two modes
and one term and without a bias. https://github.com/ensemble-core/NdLinear (`ndlinear.py`) has N modes.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from ndlora_plugins import contraction
from ndlora_plugins.contraction import (
    apply_modes,
    kron_with_identity,
    kronecker,
    kronecker_terms,
    mode_product,
    plan_contraction,
)
from ndlora_plugins.methods.base import Factor, Method, in_groups

__all__ = ["NdLinear"]


class NdLinear(Method):
    """Factors `mode_1` ... `mode_N`, each (terms, out_mode, in_mode); `rank` is the number of terms."""

    name = "ndlinear"
    summary = "structured N-dimensional update: a small matrix for each mode of the layer"
    source = "arXiv 2503.17353"
    default_rank = 1
    default_initializer = "lora_step"
    uses_modes = True

    def factors(self, layout):
        return tuple(
            Factor(f"mode_{k}", (layout.rank, out_mode, in_mode), fan_in=1 if layout.one_hot else in_mode)
            for k, (out_mode, in_mode) in enumerate(
                zip(layout.out_modes, layout.in_modes, strict=True), start=1
            )
        )

    def apply(self, layout, factors, x):
        return apply_modes(x, self._modes(layout, factors))

    def product(self, layout, factors):
        product = mode_product(layout.in_modes, layout.out_modes, layout.rank, contraction.use_triton)
        return product, tuple(self._modes(layout, factors))

    def delta(self, layout, factors):
        return kronecker(self._modes(layout, factors))

    def low_rank(self, layout, factors):
        # kron(A, B) = kron(A, I) kron(I, B) = kron(I, B) kron(A, I); small for crossed modes
        in_modes, out_modes = layout.in_modes, layout.out_modes
        inner, split, second_first = min(
            (math.prod((*left[:k], *right[k:])), k, second_first)
            for k in range(1, len(in_modes))
            for left, right, second_first in ((in_modes, out_modes, True), (out_modes, in_modes, False))
        )
        if (
            layout.rank * inner * (layout.in_features + layout.out_features)
            > layout.in_features * layout.out_features
        ):
            return None
        modes = self._modes(layout, factors)
        first, second = kronecker_terms(modes[:split]), kronecker_terms(modes[split:])
        if second_first:
            down = kron_with_identity(second, before=first.shape[2])
            up = kron_with_identity(first, after=second.shape[1])
        else:
            down = kron_with_identity(first, after=second.shape[2])
            up = kron_with_identity(second, before=first.shape[1])
        # the terms, one below the other and side by side
        return down.flatten(0, 1), up.transpose(0, 1).flatten(1)

    def lookup(self, layout, factors, indices):
        # a column of a Kronecker product is the Kronecker product of columns
        rows = None
        for mode, index in zip(
            self._modes(layout, factors),
            torch.unravel_index(indices.reshape(-1), layout.in_modes),
            strict=True,
        ):
            columns = F.embedding(index, mode.flatten(0, 1).T).view(-1, *mode.shape[:2])
            # (tokens, terms, out so far, 1) * (tokens, terms, 1, out_mode)
            rows = columns if rows is None else (rows.unsqueeze(3) * columns.unsqueeze(2)).flatten(2)
        return rows.sum(1).reshape(*indices.shape, layout.out_features)

    def convolve(self, layout, factors, x, convolution):
        modes = self._modes(layout, factors)
        kernel = [size for size in layout.trailing if size > 1]
        channels = len(modes) - len(kernel)
        if in_groups(layout, x) or [mode.shape[1:] for mode in modes[channels:]] != [(1, k) for k in kernel]:
            return super().convolve(layout, factors, x, convolution)
        # each term: one small kernel for all channels, then the channels mode by mode
        kernels = kronecker_terms(modes[channels:]) if kernel else x.new_ones(layout.rank)
        planes = x.flatten(0, 1).unsqueeze(1)
        planes = convolution(planes, kernels.reshape(layout.rank, 1, *layout.trailing))
        planes = planes.view(*x.shape[:2], *planes.shape[1:])  # (batch, channels, terms, *size)
        y = None
        for term in range(layout.rank):
            one = [mode[term : term + 1] for mode in modes[:channels]]
            update = apply_modes(planes[:, :, term].movedim(1, -1), one)
            y = update if y is None else y + update
        return y.movedim(-1, 1)

    def delta_norm(self, layout, factors):
        # <kron(A_1, .., A_N), kron(B_1, .., B_N)> = prod_k <A_k, B_k>, for every pair of terms
        products = 1
        for mode in self._modes(layout, factors):
            flat = mode.flatten(1)  # (terms, out_mode, in_mode) -> (terms, out_mode in_mode)
            products = products * (flat @ flat.T)
        return products.sum().clamp(min=0).sqrt()

    def anchored(self, layout, start, change):
        # kron(S+C) - kron(S) = sum_k kron(S_1, .., S_{k-1}, C_k, S_{k+1}+C_{k+1}, .., S_N+C_N): N times the terms
        names = [factor.name for factor in self.factors(layout)]
        now = {name: start[name] + change[name] for name in names}
        return {
            name: torch.cat(
                [(now if k < m else change if k == m else start)[name] for k in range(len(names))]
            )
            for m, name in enumerate(names)
        }

    def anchored_layout(self, layout):
        return replace(layout, rank=len(layout.in_modes) * layout.rank)

    def multiply_adds(self, layout):
        return plan_contraction(layout.in_modes, layout.out_modes, layout.rank).multiply_adds

    @staticmethod
    def _modes(layout, factors):
        return [factors[f"mode_{k}"] for k in range(1, len(layout.in_modes) + 1)]
