"""dW = up @ core @ down: LoRA's two sides with a matrix, a diagonal or nothing between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ndlora_plugins.fused import Product, add_mm_
from ndlora_plugins.structures.base import Factor, Layout, Structure

__all__ = ["Chain", "ChainProduct", "ChangedChainProduct"]


@dataclass(frozen=True)
class Chain(Structure):
    """Factors `down` (down_rank, in_features), `core` and `up` (out_features, up_rank).

    Source: arXiv 2106.09685 without a core; arXiv 2502.14482 with one.

    Attributes:
        core: "full" (up_rank, down_rank), "diagonal" (rank,), or "none": no such factor.
        indexed: sides that choose features instead of mixing them: `down` or `up` is then (rank,) integers, which
            features of the layer are read or written.
        down_blocks, up_blocks: how many sides of the layout's rank lie beside each other; they differ only around a
            full core.
    """

    layout: Layout
    core: Literal["full", "diagonal", "none"] = "full"
    indexed: tuple[str, ...] = ()
    down_blocks: int = 1
    up_blocks: int = 1

    @property
    def down_rank(self) -> int:
        """Rows of `down`."""
        return self.down_blocks * self.layout.rank

    @property
    def up_rank(self) -> int:
        """Columns of `up`."""
        return self.up_blocks * self.layout.rank

    @property
    def factors(self) -> tuple[Factor, ...]:
        ins, outs = self.layout.in_features, self.layout.out_features
        down = Factor("down", (self.down_rank, ins), fan_in=1 if self.layout.one_hot else ins)
        up = Factor("up", (outs, self.up_rank), fan_in=self.up_rank)
        if "down" in self.indexed:
            down = Factor("down", (self.down_rank,), indices=ins)
        if "up" in self.indexed:
            up = Factor("up", (self.up_rank,), indices=outs)
        if self.core == "none":
            return (down, up)
        shape = (self.up_rank, self.down_rank) if self.core == "full" else (self.down_rank,)
        return (down, Factor("core", shape, fan_in=self.down_rank if self.core == "full" else 1), up)

    @property
    def rank_axes(self) -> dict[str, tuple[int, ...]]:
        axes = {"down": (0,), "core": (0, 1) if self.core == "full" else (0,), "up": (1,)}
        axes |= {side: (0,) for side in self.indexed}
        return {factor.name: axes[factor.name] for factor in self.factors}

    @property
    def multiply_adds(self) -> int:
        sides = {
            "down": self.layout.in_features * self.down_rank,
            "up": self.layout.out_features * self.up_rank,
        }
        core = {"full": self.up_rank * self.down_rank, "diagonal": self.down_rank, "none": 0}[self.core]
        return core + sum(cost for side, cost in sides.items() if side not in self.indexed)

    def apply(self, factors, x):
        if "down" in self.indexed:
            h = x.index_select(-1, factors["down"])
        else:
            h = F.linear(x, factors["down"])
        h = _through(self._core(factors), h)
        if "up" in self.indexed:
            return h.new_zeros(*h.shape[:-1], self.layout.out_features).index_add(-1, factors["up"], h)
        return F.linear(h, factors["up"])

    def product(self, factors):
        if self.indexed:
            return None
        product = ChainProduct(self.layout.in_features, self.layout.out_features)
        return product, tuple(factors[factor.name] for factor in self.factors)

    def delta(self, factors):
        down, up = self.low_rank(factors)
        return up @ down

    def low_rank(self, factors):
        down, up = factors["down"], factors["up"]
        floating = next(factors[factor.name] for factor in self.factors if factor.indices is None)
        if "down" in self.indexed:
            down = F.one_hot(down, self.layout.in_features).to(floating.dtype)
        if "up" in self.indexed:
            up = F.one_hot(up, self.layout.out_features).T.to(floating.dtype)
        core = self._core(factors)
        if self.up_rank > self.down_rank:
            return down, _through(core, up, transposed=True)
        return _through(core, down.T).T, up

    def hold(self, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        """The factors whose update is up @ down."""
        ones = torch.ones(len(down), dtype=down.dtype, device=down.device)
        core = {"full": {"core": torch.diag(ones)}, "diagonal": {"core": ones}, "none": {}}[self.core]
        return {"down": down, **core, "up": up}

    def added(self, count):
        return replace(self, down_blocks=count * self.down_blocks, up_blocks=count * self.up_blocks)

    def add(self, parts):
        joined = {
            "down": torch.cat([part["down"] for part in parts]),
            "up": torch.cat([part["up"] for part in parts], dim=0 if "up" in self.indexed else 1),
        }
        if self.core != "none":
            cores = [part["core"] for part in parts]
            joined["core"] = torch.block_diag(*cores) if self.core == "full" else torch.cat(cores)
        return joined

    # With A = A0 + dA and so on, B N A - B0 N0 A0 = dB N A + B0 (dN A + N0 dA) = [dB, B0] [[N, 0], [dN, N0]] [A; dA]:
    # two blocks a side instead of the three of a sum, and only those that the changing factors ask for.

    def changed(self, names):
        if len(names) == 1:
            return self
        ups = ("up" in names) + bool(names & {"core", "down"})
        downs = bool(names & {"up", "core"}) + ("down" in names)
        core = "none" if self.core == "none" else "full"
        return replace(self, core=core, down_blocks=downs * self.down_blocks, up_blocks=ups * self.up_blocks)

    def change(self, start, change):
        if len(change) == 1:
            return {**start, **change}
        now = {name: value + change[name] if name in change else value for name, value in start.items()}
        # the blocks that are there: now and change of `down` along the columns, change and start of `up` along the rows
        columns = [bool(change.keys() & {"up", "core"}), "down" in change]
        rows = ["up" in change, bool(change.keys() & {"core", "down"})]
        changed = {
            "down": torch.cat(_present(columns, [now["down"], change.get("down")])),
            "up": torch.cat(_present(rows, [change.get("up"), start["up"]]), dim=-1),
        }
        if self.core != "none":
            core, zero = _matrix(start["core"]), _matrix(torch.zeros_like(start["core"]))
            core_change = _matrix(change["core"]) if "core" in change else zero
            blocks = [[_matrix(now["core"]), zero], [core_change, core]]
            changed["core"] = torch.cat(
                [torch.cat(_present(columns, row), dim=1) for row in _present(rows, blocks)]
            )
        return changed

    def change_product(self, start, change):
        if len(change) < 3 or self.core != "full":
            return super().change_product(start, change)
        names = ("down", "core", "up")
        product = ChangedChainProduct(self.layout.in_features, self.layout.out_features)
        return product, tuple(change[name] for name in names) + tuple(start[name] for name in names)

    def _core(self, factors: Mapping[str, Tensor]) -> Tensor | None:
        return None if self.core == "none" else factors["core"]


def _present(there: Sequence[bool], values: Sequence[Any]) -> list[Any]:
    return [value for is_there, value in zip(there, values, strict=True) if is_there]


def _matrix(core: Tensor) -> Tensor:
    return torch.diag(core) if core.dim() == 1 else core


def _through(core: Tensor | None, h: Tensor, transposed: bool = False) -> Tensor:
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

    def plain(self, x, tensors):
        down, core, up = _sides(tensors)
        # (..., in) -> (..., down_rank) -> (..., up_rank) -> (..., out)
        return F.linear(_through(core, F.linear(x, down)), up)

    def forward(self, x, tensors, needs, result, scaling):
        down, core, up = _sides(_cast(tensors, x.dtype))
        h = x @ down.T
        kept = ((x,) if needs[0] else ()) + ((h,) if any(needs[1:]) else ())
        return add_mm_(result, _through(core, h), up.T, scaling), kept

    def add_few(self, tensors, result, x, scaling):
        down, core, up = _sides(tensors)
        if not _is_vector(x) or core is None or core.dim() == 1:
            return super().add_few(tensors, result, x, scaling)
        result.view(-1).addmv_(up, core.mv(down.mv(x.reshape(-1))), alpha=scaling)

    def backward(self, kept, tensors, grad, needs, needs_x, grad_x, scaling):
        down, core, up = _sides(_cast(tensors, grad.dtype))
        grads = [None] * len(tensors)
        needs_core = core is not None and needs[1]
        if needs[-1]:
            grads[-1] = _scaled(grad.T @ _through(core, kept[-1]), scaling, tensors[-1])
        if needs_x or needs[0] or needs_core:
            grad_u = grad @ up  # of u = core h
        if needs_core:
            core_grad = grad_u.T @ kept[-1] if core.dim() == 2 else (grad_u * kept[-1]).sum(0)
            grads[1] = _scaled(core_grad, scaling, tensors[1])
        if needs_x or needs[0]:
            grad_h = _through(core, grad_u, transposed=True)
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

    def plain(self, x, tensors):
        down, core, up, start_down, start_core, start_up = tensors
        d = F.linear(x, down)
        both = F.linear(x, start_down) + d
        return F.linear(F.linear(both, start_core + core), up) + F.linear(
            F.linear(both, core) + F.linear(d, start_core), start_up
        )

    def forward(self, x, tensors, needs, result, scaling):
        downs, core, cores, ups = self._joined(tensors, x.dtype)
        rank = len(core)
        h = x @ downs.T  # (tokens, 2 rank)
        both = h[:, :rank] + h[:, rank:]
        kept = ((x,) if needs[0] else ()) + ((both,) if needs[1] or needs[2] else ())
        return add_mm_(result, h @ cores.T, ups.T, scaling), kept

    def add_few(self, tensors, result, x, scaling):
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

    def backward(self, kept, tensors, grad, needs, needs_x, grad_x, scaling):
        downs, core, cores, ups = self._joined(tensors, grad.dtype)
        rank = len(core)
        grads = [None] * len(tensors)
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
    def _joined(tensors, dtype):
        """[A0; dA] (2 rank, in), N, [[N, N], [dN, N]], [dB, B0] (out, 2 rank)."""
        down, core, up, start_down, start_core, start_up = _cast(tensors, dtype)
        now = start_core + core
        cores = torch.cat([torch.cat([now, now], dim=1), torch.cat([core, now], dim=1)])
        return torch.cat([start_down, down]), now, cores, torch.cat([up, start_up], dim=1)


def _sides(tensors):
    """(down, core or None, up)."""
    return tensors if len(tensors) == 3 else (tensors[0], None, tensors[1])


def _is_vector(x):
    """Whether x is one token, whose products with matrices are called faster as vectors'; not so in 16 bit."""
    return x.numel() == x.shape[-1] and x.dtype.itemsize >= 4


def _cast(tensors, dtype):
    return tensors if tensors[0].dtype == dtype else [tensor.to(dtype) for tensor in tensors]


def _scaled(gradient, scaling, tensor):
    gradient = gradient.to(tensor.dtype)
    return gradient if scaling == 1 else gradient.mul_(scaling)
