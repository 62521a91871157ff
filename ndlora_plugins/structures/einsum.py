"""Any multilinear contraction, given as an equation: "out r, r s, s in -> out in" is SLoRA.

Every view is a contraction derived from the equation; `torch.einsum` plans it with opt_einsum. Slower than the
structures that are written out, and the same in every view.
"""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.structures.base import Factor, Factors, Layout, Structure

__all__ = ["Einsum", "Equation"]

Axes = tuple[str, ...]

_MOST_FACTORS = 12  # every cut between them is looked at
_MOST_AXES = 24  # torch.einsum has 52 letters, and the norm takes two for an axis

_TOKENS = "tokens'"


@dataclass(frozen=True)
class Equation:
    """A contraction of named axes.

    Attributes:
        factors: the axes of each factor.
        outs, ins: the axes of dW's rows and of its columns, row-major: their names begin with "out" and "in".
    """

    factors: tuple[Axes, ...]
    outs: Axes
    ins: Axes

    @classmethod
    def parse(cls, text: str) -> Equation:
        """Read "out r, r s, s in -> out in": factors by commas, axes by spaces.

        Raises:
            NdLoraValueError: it is no multilinear form of dW.
        """
        sides = text.split("->") if isinstance(text, str) else []
        if len(sides) != 2:
            raise _wrong(text, "it needs one '->', with the factors before it")
        factors = tuple(tuple(factor.split()) for factor in sides[0].split(","))
        result = tuple(sides[1].split())
        outs = tuple(itertools.takewhile(lambda axis: axis.startswith("out"), result))
        ins = result[len(outs) :]
        if not outs or not ins or not all(axis.startswith("in") for axis in ins):
            raise _wrong(
                text, "behind '->' stand the axes named out..., then those named in..., at least one of each"
            )
        for axes in (*factors, result):
            if not axes:
                raise _wrong(text, "a factor has no axes")
            if len(set(axes)) < len(axes):
                raise _wrong(text, f"{' '.join(axes)!r} has an axis twice")
        uses = [axis for axes in factors for axis in axes]
        if len(factors) > _MOST_FACTORS or len(set(uses)) > _MOST_AXES:
            raise _wrong(text, f"it has more than {_MOST_FACTORS} factors or {_MOST_AXES} axes")
        for axis in uses:
            if not axis.isidentifier():  # the names that this file adds are none, so that they are nobody's
                raise _wrong(text, f"{axis!r} is no name of an axis: use letters, digits and underscores")
        for axis in result:
            if axis not in uses:
                raise _wrong(text, f"no factor has the axis {axis!r}")
        for axis in uses:
            if axis not in result and uses.count(axis) == 1:
                raise _wrong(text, f"the axis {axis!r} is in one factor only, which it would sum up")
            if axis not in result and axis.startswith(("out", "in")):
                raise _wrong(
                    text, f"the axis {axis!r} is named as one of dW's, but does not stand behind '->'"
                )
        return cls(factors, outs, ins)

    @cached_property
    def inner(self) -> Axes:
        """The axes that are summed over, in order of appearance."""
        return tuple(dict.fromkeys(a for axes in self.factors for a in axes if a not in self.outs + self.ins))

    def cut(self, left: Sequence[int]) -> tuple[Axes, Axes, Axes]:
        """The axes between the factors `left` and the others: inner ones of both, in of the left, out of the others."""
        of_left, of_right = (
            {axis for k, axes in enumerate(self.factors) if (k in left) == side for axis in axes}
            for side in (True, False)
        )
        bonds = tuple(axis for axis in self.inner if axis in of_left & of_right)
        ins_left = tuple(axis for axis in self.ins if axis in of_left)
        outs_right = tuple(axis for axis in self.outs if axis in of_right)
        return bonds, ins_left, outs_right


def _wrong(text: object, reason: str) -> NdLoraValueError:
    return NdLoraValueError(
        f"equation={text!r} is no multilinear form: {reason}. Write it as 'out r, r s, s in -> out in'."
    )


@dataclass(frozen=True)
class Einsum(Structure):
    """One factor for each term of the equation before "->".

    Attributes:
        sizes: of all axes.
        names: of the factors.
        ranked: the axes that the layout's rank numbers.
    """

    layout: Layout
    equation: Equation
    sizes: tuple[tuple[str, int], ...]
    names: tuple[str, ...]
    ranked: Axes = ()

    @cached_property
    def size(self) -> dict[str, int]:
        """The size of each axis."""
        return dict(self.sizes) | dict.fromkeys(self.ranked, self.layout.rank)

    @cached_property
    def factors(self) -> tuple[Factor, ...]:
        factors = []
        for k, (name, axes) in enumerate(zip(self.names, self.equation.factors, strict=True)):
            # what is nearer to the input is contracted: in axes, and those shared with later factors
            later = {axis for others in self.equation.factors[k + 1 :] for axis in others}
            read = [axis for axis in axes if axis in self.equation.ins or axis in later]
            fan_in = 1 if self.layout.one_hot and set(read) & set(self.equation.ins) else self._count(read)
            factors.append(Factor(name, tuple(self.size[axis] for axis in axes), fan_in))
        return tuple(factors)

    @property
    def rank_axes(self) -> dict[str, tuple[int, ...]]:
        axes = zip(self.names, self.equation.factors, strict=True)
        return {name: tuple(k for k, axis in enumerate(each) if axis in self.ranked) for name, each in axes}

    @cached_property
    def multiply_adds(self) -> int:
        import opt_einsum

        tokens = 256
        operands = [(_TOKENS, *self.equation.ins), *self.equation.factors]
        text, size = _subscripts(operands, (_TOKENS, *self.equation.outs)), self.size | {_TOKENS: tokens}
        shapes = (tuple(size[axis] for axis in axes) for axes in operands)
        cost = opt_einsum.contract_path(text, *shapes, shapes=True)[1].opt_cost
        return round(float(cost) / (2 * tokens))  # it counts a multiplication and an addition as two

    def apply(self, factors: Factors, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, *(self.size[axis] for axis in self.equation.ins))
        operands = [(tokens, (_TOKENS, *self.equation.ins)), *self._operands(factors)]
        y = _einsum(operands, (_TOKENS, *self.equation.outs))
        return y.reshape(*x.shape[:-1], self.layout.out_features)

    def delta(self, factors: Factors) -> Tensor:
        delta = _einsum(self._operands(factors), self.equation.outs + self.equation.ins)
        return delta.reshape(self.layout.out_features, self.layout.in_features)

    def low_rank(self, factors: Factors) -> tuple[Tensor, Tensor] | None:
        features = self.layout.in_features, self.layout.out_features
        left = _best_cut(self.equation, tuple(self.size.items()))
        bonds, ins_left, outs_right = self.equation.cut(left)
        inner = self._count((*bonds, *ins_left, *outs_right))
        if not left or inner * sum(features) > math.prod(features):
            return None
        cut = (*bonds, *(f"{axis}'" for axis in (*ins_left, *outs_right)))

        def side(is_left: bool, passed: Axes, copied: Axes, result: Axes) -> Tensor:
            """The factors of one side, the axes that they make for the other renamed, the other's copied."""
            operands = [
                (value, tuple(f"{axis}'" if axis in passed else axis for axis in axes))
                for k, (value, axes) in enumerate(self._operands(factors))
                if (k in left) == is_left
            ]
            eyes = (torch.eye(self.size[axis]).to(operands[0][0]) for axis in copied)
            operands += [(eye, (axis, f"{axis}'")) for eye, axis in zip(eyes, copied, strict=True)]
            return _einsum(operands, result)

        # up copies the out axes that the right factors make, down the in axes that the left factors read
        up = side(True, ins_left, outs_right, self.equation.outs + cut).reshape(-1, inner)
        down = side(False, outs_right, ins_left, cut + self.equation.ins).reshape(inner, -1)
        return down, up

    def norm(self, factors: Factors) -> Tensor:
        operands, again = self._operands(factors), {axis: f"{axis}'" for axis in self.equation.inner}
        others = [(value, tuple(again.get(axis, axis) for axis in axes)) for value, axes in operands]
        return _einsum([*operands, *others], ()).clamp(min=0).sqrt()

    def lookup(self, factors: Factors, indices: Tensor) -> Tensor:
        # an in axis of a factor becomes the axis of the tokens: its entry at each token's index
        ins = self.equation.ins
        index = torch.unravel_index(indices.reshape(-1), [self.size[axis] for axis in ins])
        positions = dict(zip(ins, index, strict=True))
        operands = []
        for value, axes in self._operands(factors):
            read = [axis for axis in axes if axis in positions]
            if read:
                others = tuple(axis for axis in axes if axis not in positions)
                value = value.permute([axes.index(axis) for axis in (*read, *others)])
                value, axes = value[tuple(positions[axis] for axis in read)], (_TOKENS, *others)
            operands.append((value, axes))
        y = _einsum(operands, (_TOKENS, *self.equation.outs))
        return y.reshape(*indices.shape, self.layout.out_features)

    def added(self, count: int) -> Einsum:
        axis = f"term'{len(self.sizes)}"
        equation = replace(self.equation, factors=tuple((axis, *axes) for axes in self.equation.factors))
        return replace(self, equation=equation, sizes=(*self.sizes, (axis, count)))

    def add(self, parts: Sequence[Factors]) -> dict[str, Tensor]:
        return {name: torch.stack([part[name] for part in parts]) for name in self.names}

    def _operands(self, factors: Factors) -> list[tuple[Tensor, Axes]]:
        """Each factor with its axes."""
        return [(factors[name], axes) for name, axes in zip(self.names, self.equation.factors, strict=True)]

    def _count(self, axes: Iterable[str]) -> int:
        return math.prod(self.size[axis] for axis in axes)


@lru_cache(maxsize=1024)
def _best_cut(equation: Equation, sizes: tuple[tuple[str, int], ...]) -> tuple[int, ...]:
    """The factors left of the smallest cut, of all of them; () of an equation of one factor."""
    size, count = dict(sizes), len(equation.factors)
    return min(
        (left for n in range(1, count) for left in itertools.combinations(range(count), n)),
        key=lambda left: math.prod(size[axis] for axis in itertools.chain(*equation.cut(left))),
        default=(),
    )


def _einsum(operands: Sequence[tuple[Tensor, Axes]], result: Axes) -> Tensor:
    tensors, axes = zip(*operands, strict=True)
    return torch.einsum(_subscripts(axes, result), *tensors)


def _subscripts(operands: Sequence[Axes], result: Axes) -> str:
    """The equation in the letters that `torch.einsum` takes."""
    letters = dict(zip(dict.fromkeys(itertools.chain(*operands)), string.ascii_letters, strict=False))
    *read, made = ("".join(letters[axis] for axis in axes) for axes in (*operands, result))
    return f"{','.join(read)}->{made}"
