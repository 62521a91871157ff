"""dW = up @ core @ down: LoRA's two sides with a matrix, a diagonal or nothing between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ndlora_plugins.fused import Product
from ndlora_plugins.kernels.chain import ChainProduct, ChangedChainProduct, through_core
from ndlora_plugins.structures.base import Factor, Factors, Layout, Structure

__all__ = ["Chain"]


@dataclass(frozen=True)
class Chain(Structure):
    """Factors `down` (down_rank, in_features), `core` and `up` (out_features, up_rank).

    Source: arXiv 2106.09685 without a core; arXiv 2502.14482 with one.

    Attributes:
        core: "full" (up_rank, down_rank), "diagonal" (rank,), or "none": no such factor.
        indexed: sides that choose features instead of mixing them. In place of `down` stand then `columns`, in place
            of `up` `rows`: (rank,) integers, the features of the layer that are read or written.
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
            down = Factor("columns", (self.down_rank,), indices=ins)
        if "up" in self.indexed:
            up = Factor("rows", (self.up_rank,), indices=outs)
        if self.core == "none":
            return (down, up)
        shape = (self.up_rank, self.down_rank) if self.core == "full" else (self.down_rank,)
        return (down, Factor("core", shape, fan_in=self.down_rank if self.core == "full" else 1), up)

    @property
    def rank_axes(self) -> dict[str, tuple[int, ...]]:
        axes = {"down": (0,), "columns": (0,), "core": (0, 1) if self.core == "full" else (0,)}
        axes |= {"up": (1,), "rows": (0,)}
        return {factor.name: axes[factor.name] for factor in self.factors}

    @property
    def multiply_adds(self) -> int:
        sides = {
            "down": self.layout.in_features * self.down_rank,
            "up": self.layout.out_features * self.up_rank,
        }
        core = {"full": self.up_rank * self.down_rank, "diagonal": self.down_rank, "none": 0}[self.core]
        return core + sum(cost for side, cost in sides.items() if side not in self.indexed)

    def apply(self, factors: Factors, x: Tensor) -> Tensor:
        if "down" in self.indexed:
            h = x.index_select(-1, factors["columns"])
        else:
            h = F.linear(x, factors["down"])
        h = through_core(self._core(factors), h)
        if "up" in self.indexed:
            return h.new_zeros(*h.shape[:-1], self.layout.out_features).index_add(-1, factors["rows"], h)
        return F.linear(h, factors["up"])

    def product(self, factors: Factors) -> tuple[Product, tuple[Tensor, ...]] | None:
        if self.indexed:
            return None
        product = ChainProduct(self.layout.in_features, self.layout.out_features)
        return product, tuple(factors[factor.name] for factor in self.factors)

    def delta(self, factors: Factors) -> Tensor:
        down, up = self.low_rank(factors)
        return up @ down

    def low_rank(self, factors: Factors) -> tuple[Tensor, Tensor]:
        floating = next(factors[factor.name] for factor in self.factors if factor.indices is None)
        if "down" in self.indexed:
            down = F.one_hot(factors["columns"], self.layout.in_features).to(floating.dtype)
        else:
            down = factors["down"]
        if "up" in self.indexed:
            up = F.one_hot(factors["rows"], self.layout.out_features).T.to(floating.dtype)
        else:
            up = factors["up"]
        core = self._core(factors)
        if self.up_rank > self.down_rank:
            return down, through_core(core, up, transposed=True)
        return through_core(core, down.T).T, up

    def hold(self, down: Tensor, up: Tensor) -> dict[str, Tensor]:
        """The factors whose update is up @ down."""
        ones = torch.ones(len(down), dtype=down.dtype, device=down.device)
        core = {"full": {"core": torch.diag(ones)}, "diagonal": {"core": ones}, "none": {}}[self.core]
        return {"down": down, **core, "up": up}

    def added(self, count: int) -> Chain:
        return replace(self, down_blocks=count * self.down_blocks, up_blocks=count * self.up_blocks)

    def add(self, parts: Sequence[Factors]) -> dict[str, Tensor]:
        axes = {"up": 1}
        joined = {
            factor.name: torch.cat([part[factor.name] for part in parts], dim=axes.get(factor.name, 0))
            for factor in self.factors
            if factor.name != "core" or self.core == "diagonal"
        }
        if self.core == "full":
            joined["core"] = torch.block_diag(*(part["core"] for part in parts))
        return joined

    # With A = A0 + dA and so on, B N A - B0 N0 A0 = dB N A + B0 (dN A + N0 dA) = [dB, B0] [[N, 0], [dN, N0]] [A; dA]:
    # two blocks a side instead of the three of a sum, and only those that the changing factors ask for.

    def changed(self, names: frozenset[str]) -> Structure:
        if len(names) == 1 or self.indexed:
            return super().changed(names)
        ups = ("up" in names) + bool(names & {"core", "down"})
        downs = bool(names & {"up", "core"}) + ("down" in names)
        core = "none" if self.core == "none" else "full"
        return replace(self, core=core, down_blocks=downs * self.down_blocks, up_blocks=ups * self.up_blocks)

    def change(self, start: Factors, change: Factors) -> Mapping[str, Tensor]:
        if len(change) == 1 or self.indexed:
            return super().change(start, change)
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

    def change_product(self, start: Factors, change: Factors) -> tuple[Product, tuple[Tensor, ...]] | None:
        if len(change) < 3 or self.core != "full":
            return super().change_product(start, change)
        names = ("down", "core", "up")
        product = ChangedChainProduct(self.layout.in_features, self.layout.out_features)
        return product, tuple(change[name] for name in names) + tuple(start[name] for name in names)

    def _core(self, factors: Factors) -> Tensor | None:
        return None if self.core == "none" else factors["core"]


def _present(there: Sequence[bool], values: Sequence[Any]) -> list[Any]:
    return [value for is_there, value in zip(there, values, strict=True) if is_there]


def _matrix(core: Tensor) -> Tensor:
    return torch.diag(core) if core.dim() == 1 else core
