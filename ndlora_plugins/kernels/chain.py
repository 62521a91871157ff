"""The products of a chain, up @ core @ down, with gradients of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ndlora_plugins.fused import Gradients, Kept, Product, add_mm_

__all__ = ["ChainProduct", "ChangedChainProduct", "through_core"]


def through_core(core: Tensor | None, h: Tensor, transposed: bool = False) -> Tensor:
    """core h for h (..., rank), or core^T h: of a matrix, a diagonal, or h itself."""
    if core is None:
        return h
    if core.dim() == 1:
        return h * core
    return h @ core if transposed else F.linear(h, core)


@dataclass(frozen=True)
class ChainProduct(Product):
    """Tensors `down` (down_rank, in), `core` if there is one, `up` (out, up_rank).

    Keeps down x (tokens, rank) where it is needed and, only if `down` trains, x.
    """

    in_features: int
    out_features: int

    def plain(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        down, core, up = _sides(tensors)
        # (..., in) -> (..., down_rank) -> (..., up_rank) -> (..., out)
        return F.linear(through_core(core, F.linear(x, down)), up)

    def forward(
        self,
        x: Tensor,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        result: Tensor | None,
        scaling: float,
    ) -> tuple[Tensor, Kept]:
        down, core, up = _sides(_cast(tensors, x.dtype))
        h = x @ down.T
        kept = ((x,) if needs[0] else ()) + ((h,) if any(needs[1:]) else ())
        return add_mm_(result, through_core(core, h), up.T, scaling), kept

    def add_few(self, tensors: Sequence[Tensor], result: Tensor, x: Tensor, scaling: float) -> None:
        down, core, up = _sides(tensors)
        if not _is_vector(x) or core is None or core.dim() == 1:
            return super().add_few(tensors, result, x, scaling)
        result.view(-1).addmv_(up, core.mv(down.mv(x.reshape(-1))), alpha=scaling)

    def backward(
        self,
        kept: Sequence[Tensor],
        tensors: Sequence[Tensor],
        grad: Tensor,
        needs: Sequence[bool],
        needs_x: bool,
        grad_x: Tensor | None,
        scaling: float,
    ) -> tuple[Tensor | None, Gradients]:
        down, core, up = _sides(_cast(tensors, grad.dtype))
        grads: Gradients = [None] * len(tensors)
        needs_core = core is not None and needs[1]
        if needs[-1]:
            grads[-1] = _scaled(grad.T @ through_core(core, kept[-1]), scaling, tensors[-1])
        if needs_x or needs[0] or needs_core:
            grad_u = grad @ up  # of u = core h
        if needs_core:
            core_grad = grad_u.T @ kept[-1] if tensors[1].dim() == 2 else (grad_u * kept[-1]).sum(0)
            grads[1] = _scaled(core_grad, scaling, tensors[1])
        if needs_x or needs[0]:
            grad_h = through_core(core, grad_u, transposed=True)
        if needs[0]:
            grads[0] = _scaled(grad_h.T @ kept[0], scaling, tensors[0])
        return (add_mm_(grad_x, grad_h, down, scaling) if needs_x else None), grads


@dataclass(frozen=True)
class ChangedChainProduct(Product):
    """B N A - B0 N0 A0 of A = A0 + dA, N = N0 + dN, B = B0 + dB, telescoped so that nothing cancels.

    Tensors: dA, dN, dB, A0, N0, B0, shaped as in `ChainProduct` with a full core. Two products of twice the rank:

        h, d = A0 x, dA x;    result += [dB, B0] [N (h + d); dN (h + d) + N0 d]

    Backward needs h + d (tokens, rank) alone, and the gradient of dA is one of `rank` rows: as LoRA's.
    """

    in_features: int
    out_features: int

    def plain(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        down, core, up, start_down, start_core, start_up = tensors
        d = F.linear(x, down)
        both = F.linear(x, start_down) + d
        return F.linear(F.linear(both, start_core + core), up) + F.linear(
            F.linear(both, core) + F.linear(d, start_core), start_up
        )

    def forward(
        self,
        x: Tensor,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        result: Tensor | None,
        scaling: float,
    ) -> tuple[Tensor, Kept]:
        downs, core, cores, ups = self._joined(tensors, x.dtype)
        rank = len(core)
        h = x @ downs.T  # (tokens, 2 rank)
        both = h[:, :rank] + h[:, rank:]
        kept = ((x,) if needs[0] else ()) + ((both,) if needs[1] or needs[2] else ())
        return add_mm_(result, h @ cores.T, ups.T, scaling), kept

    def add_few(self, tensors: Sequence[Tensor], result: Tensor, x: Tensor, scaling: float) -> None:
        # joining the tensors would cost more than it saves
        down, core, up, start_down, start_core, start_up = tensors
        if _is_vector(x):
            x, result = x.reshape(-1), result.view(-1)
            d = down.mv(x)
            both = torch.addmv(d, start_down, x)
            changed = core.mv(both)
            result.addmv_(up, torch.addmv(changed, start_core, both), alpha=scaling)
            result.addmv_(start_up, torch.addmv(changed, start_core, d), alpha=scaling)
            return
        x, result = x.reshape(-1, self.in_features), result.view(-1, self.out_features)
        d = F.linear(x, down)
        both = torch.addmm(d, x, start_down.T)
        changed = F.linear(both, core)
        result.addmm_(torch.addmm(changed, both, start_core.T), up.T, alpha=scaling)
        result.addmm_(torch.addmm(changed, d, start_core.T), start_up.T, alpha=scaling)

    def backward(
        self,
        kept: Sequence[Tensor],
        tensors: Sequence[Tensor],
        grad: Tensor,
        needs: Sequence[bool],
        needs_x: bool,
        grad_x: Tensor | None,
        scaling: float,
    ) -> tuple[Tensor | None, Gradients]:
        downs, core, cores, ups = self._joined(tensors, grad.dtype)
        rank = len(core)
        grads: Gradients = [None] * len(tensors)
        grad_u = grad @ ups  # (tokens, 2 rank)
        if needs[2]:
            grads[2] = _scaled(grad.T @ (kept[-1] @ core.T), scaling, tensors[2])
        if needs[1]:
            grads[1] = _scaled((grad_u[:, :rank] + grad_u[:, rank:]).T @ kept[-1], scaling, tensors[1])
        if needs[0] or needs_x:
            grad_h = grad_u @ cores
        if needs[0]:
            grads[0] = _scaled(grad_h[:, rank:].T @ kept[0], scaling, tensors[0])
        return (add_mm_(grad_x, grad_h, downs, scaling) if needs_x else None), grads

    @staticmethod
    def _joined(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """[A0; dA] (2 rank, in), N, [[N, N], [dN, N]], [dB, B0] (out, 2 rank)."""
        down, core, up, start_down, start_core, start_up = _cast(tensors, dtype)
        now = start_core + core
        cores = torch.cat([torch.cat([now, now], dim=1), torch.cat([core, now], dim=1)])
        return torch.cat([start_down, down]), now, cores, torch.cat([up, start_up], dim=1)


def _sides(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
    """(down, core or None, up)."""
    return tensors[0], tensors[1] if len(tensors) == 3 else None, tensors[-1]


def _is_vector(x: Tensor) -> bool:
    """Whether x is one token, whose products with matrices are called faster as vectors'; not so in 16 bit."""
    return x.numel() == x.shape[-1] and x.dtype.itemsize >= 4


def _cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    return tensors if tensors[0].dtype == dtype else [tensor.to(dtype) for tensor in tensors]


def _scaled(gradient: Tensor, scaling: float, tensor: Tensor) -> Tensor:
    gradient = gradient.to(tensor.dtype)
    return gradient if scaling == 1 else gradient.mul_(scaling)
