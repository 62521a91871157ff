"""The mode-wise product of two modes in Triton: one kernel forward, two backward, no intermediate in memory.

Off unless `NDLORA_TRITON=1` is in the environment: the kernels agree with the other form in Triton's interpreter and
compile for NVIDIA's sm_80 and sm_90, but they were never timed on a GPU. Where there is one, `make gpu` tests them and
times both forms.

A block of tokens is read as a matrix with the rows (mode 1, token) and the columns mode 2. The same numbers in the
same order are a matrix (mode 1, token mode 2), so that either mode is contracted for all tokens of the block by one
product of matrices. Modes are padded with zeros to powers of two, of at least 16. Sums are float32; between two
products numbers are rounded to x's dtype, as in the other form.
"""

# Triton is not everywhere, and where it is, its types do not know how a kernel is called:
# pyright: reportMissingImports=false, reportIndexIssue=false, reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ndlora_plugins.fused import Gradients, Kept, Product
from ndlora_plugins.kernels.modes import ModeProduct, mode_product, plan_contraction

__all__ = ["TritonModeProduct", "add_product", "factor_gradients", "triton_mode_product"]


@triton.jit
def _block(
    start,
    tokens,
    MODE_1: tl.constexpr,
    MODE_2: tl.constexpr,
    PADDED_1: tl.constexpr,
    PADDED_2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where (mode 1 token, mode 2) lies in (tokens, features), for the tokens from `start` on, and what is there."""
    row, mode_2 = tl.arange(0, PADDED_1 * BLOCK)[:, None], tl.arange(0, PADDED_2)[None, :]
    mode_1, token = row // BLOCK, start + row % BLOCK
    offsets = token.to(tl.int64) * (MODE_1 * MODE_2) + mode_1 * MODE_2 + mode_2
    return offsets, (mode_1 < MODE_1) & (token < tokens) & (mode_2 < MODE_2)


@triton.jit
def _entries(
    term,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PADDED_ROWS: tl.constexpr,
    PADDED_COLUMNS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Where the matrix of one term lies in (terms, rows, columns), or (terms, columns, rows), and what is there."""
    row, column = tl.arange(0, PADDED_ROWS)[:, None], tl.arange(0, PADDED_COLUMNS)[None, :]
    offsets = term * (ROWS * COLUMNS) + (column * ROWS + row if TRANSPOSED else row * COLUMNS + column)
    return offsets, (row < ROWS) & (column < COLUMNS)


@triton.jit
def add_product(
    x,
    first,
    second,
    result,
    tokens,
    scaling,
    IN_1: tl.constexpr,
    IN_2: tl.constexpr,
    OUT_1: tl.constexpr,
    OUT_2: tl.constexpr,
    PADDED_IN_1: tl.constexpr,
    PADDED_IN_2: tl.constexpr,
    PADDED_OUT_1: tl.constexpr,
    PADDED_OUT_2: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SECOND_MODE_FIRST: tl.constexpr,
    ADD: tl.constexpr,
):
    """result = (result if ADD else 0) + scaling * the sum over the terms of W_1 x W_2^T for each token.

    x is (tokens, in_1 in_2), result (tokens, out_1 out_2), a factor (terms, out, in), or (terms, in, out) if
    TRANSPOSED.
    """
    start = tl.program_id(0) * BLOCK
    offsets, mask = _block(start, tokens, IN_1, IN_2, PADDED_IN_1, PADDED_IN_2, BLOCK)
    values = tl.load(x + offsets, mask, other=0.0)
    total = tl.zeros((PADDED_OUT_1 * BLOCK, PADDED_OUT_2), tl.float32)
    for term in range(TERMS):
        # (out_1, in_1), (in_2, out_2)
        where, there = _entries(term, OUT_1, IN_1, PADDED_OUT_1, PADDED_IN_1, TRANSPOSED)
        left = tl.load(first + where, there, other=0.0).to(values.dtype)
        where, there = _entries(term, IN_2, OUT_2, PADDED_IN_2, PADDED_OUT_2, not TRANSPOSED)
        right = tl.load(second + where, there, other=0.0).to(values.dtype)
        if SECOND_MODE_FIRST:
            # (in_1 token, in_2) -> (in_1 token, out_2) = (in_1, token out_2) -> (out_1, token out_2)
            y = tl.dot(values, right).to(values.dtype)
            y = tl.reshape(y, (PADDED_IN_1, BLOCK * PADDED_OUT_2))
            y = tl.dot(left, y)
            total += tl.reshape(y, (PADDED_OUT_1 * BLOCK, PADDED_OUT_2))
        else:
            # (in_1, token in_2) -> (out_1, token in_2) = (out_1 token, in_2) -> (out_1 token, out_2)
            y = tl.reshape(values, (PADDED_IN_1, BLOCK * PADDED_IN_2))
            y = tl.dot(left, y).to(values.dtype)
            y = tl.reshape(y, (PADDED_OUT_1 * BLOCK, PADDED_IN_2))
            total = tl.dot(y, right, total)
    total *= scaling
    offsets, mask = _block(start, tokens, OUT_1, OUT_2, PADDED_OUT_1, PADDED_OUT_2, BLOCK)
    if ADD:
        total += tl.load(result + offsets, mask, other=0.0)
    tl.store(result + offsets, total.to(result.dtype.element_ty), mask)


@triton.jit
def factor_gradients(
    x,
    grad,
    first,
    second,
    first_sums,
    second_sums,
    tokens,
    IN_1: tl.constexpr,
    IN_2: tl.constexpr,
    OUT_1: tl.constexpr,
    OUT_2: tl.constexpr,
    PADDED_IN_1: tl.constexpr,
    PADDED_IN_2: tl.constexpr,
    PADDED_OUT_1: tl.constexpr,
    PADDED_OUT_2: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """The gradients of the factors' terms, without scaling. One program takes one term and every so manyth block.

    x is (tokens, in_1 in_2), grad (tokens, out_1 out_2). Each program writes its own part of the sums, which are
    (programs, terms, out, in) in float32: no atomics, so that the result is the same every time.
    """
    program, term = tl.program_id(0), tl.program_id(1)
    # (in_1, out_1), (in_2, out_2)
    offsets, mask = _entries(term, IN_1, OUT_1, PADDED_IN_1, PADDED_OUT_1, True)
    left = tl.load(first + offsets, mask, other=0.0).to(x.dtype.element_ty)
    offsets, mask = _entries(term, IN_2, OUT_2, PADDED_IN_2, PADDED_OUT_2, True)
    right = tl.load(second + offsets, mask, other=0.0).to(x.dtype.element_ty)
    first_sum = tl.zeros((PADDED_OUT_1, PADDED_IN_1), tl.float32)
    second_sum = tl.zeros((PADDED_OUT_2, PADDED_IN_2), tl.float32)
    for start in range(program * BLOCK, tokens, tl.num_programs(0) * BLOCK):
        where, there = _block(start, tokens, IN_1, IN_2, PADDED_IN_1, PADDED_IN_2, BLOCK)
        values = tl.load(x + where, there, other=0.0)
        where, there = _block(start, tokens, OUT_1, OUT_2, PADDED_OUT_1, PADDED_OUT_2, BLOCK)
        slopes = tl.load(grad + where, there, other=0.0)
        slopes = tl.reshape(slopes, (PADDED_OUT_1, BLOCK * PADDED_OUT_2))
        if FIRST:
            # (in_1 token, in_2) -> (in_1 token, out_2) = (in_1, token out_2); summed over token out_2
            y = tl.dot(values, right).to(values.dtype)
            y = tl.reshape(y, (PADDED_IN_1, BLOCK * PADDED_OUT_2))
            first_sum = tl.dot(slopes, tl.trans(y), first_sum)
        if SECOND:
            # (out_1, token out_2) -> (in_1, token out_2) = (in_1 token, out_2); summed over in_1 token
            y = tl.dot(left, slopes).to(values.dtype)
            y = tl.reshape(y, (PADDED_IN_1 * BLOCK, PADDED_OUT_2))
            second_sum = tl.dot(tl.trans(y), values, second_sum)
    if FIRST:
        offsets, mask = _entries(program * TERMS + term, OUT_1, IN_1, PADDED_OUT_1, PADDED_IN_1, False)
        tl.store(first_sums + offsets, first_sum, mask)
    if SECOND:
        offsets, mask = _entries(program * TERMS + term, OUT_2, IN_2, PADDED_OUT_2, PADDED_IN_2, False)
        tl.store(second_sums + offsets, second_sum, mask)


# A factor's matrix and its gradient are held whole.
_LARGEST_MODE = 128
# Bytes of one token's x and gradient, padded: with more, `factor_gradients` no longer fits into the 163 KiB of shared
# memory of sm_80. Llama-3-8B's 4096 x 14336 fits in bfloat16.
_LARGEST_TOKEN = 40 << 10
# Bytes of a block of tokens, padded: with more, small modes need more registers than there are.
_LARGEST_BLOCK = 8 << 10
# Of `factor_gradients`: about as many as a large GPU has multiprocessors. No GPU is asked, so that all sum alike.
_PROGRAMS = 128

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED = not isinstance(add_product, triton.JITFunction)  # TRITON_INTERPRET=1: on any device


@dataclass(frozen=True)
class TritonModeProduct(Product):
    """Two modes on an NVIDIA GPU in float32, bfloat16 or float16; everything else is left to `otherwise`.

    Backward keeps x alone. float32 is taken where torch's own products of matrices are allowed TF32: exact
    ones, or three of TF32 for one, need several times the registers that there are.
    """

    otherwise: ModeProduct
    in_modes: tuple[int, int]
    out_modes: tuple[int, int]
    terms: int

    @property
    def in_features(self) -> int:
        return self.otherwise.in_features

    @property
    def out_features(self) -> int:
        return self.otherwise.out_features

    def plain(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        return self.otherwise.plain(x, tensors)

    def forward(
        self,
        x: Tensor,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        result: Tensor | None,
        scaling: float,
    ) -> tuple[Tensor, Kept]:
        if not self._takes(x):
            return self.otherwise.forward(x, tensors, needs, result, scaling)
        return self._add(x, tensors, result, scaling, False), (x,) if True in needs else ()

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
        if not self._takes(grad):
            return self.otherwise.backward(kept, tensors, grad, needs, needs_x, grad_x, scaling)
        if needs_x:
            grad_x = self._add(grad, tensors, grad_x, scaling, True)
        if True not in needs:
            return grad_x, [None, None]
        return grad_x, self._gradients(kept[0], grad, tensors, needs, scaling)

    def constants(self, dtype: torch.dtype, transposed: bool = False) -> dict[str, object]:
        """The sizes that both kernels are compiled for, and their launch options; for x of `dtype`.

        Args:
            transposed: whether the product is dW^T, from out modes to in modes.
        """
        in_modes, out_modes = (
            (self.out_modes, self.in_modes) if transposed else (self.in_modes, self.out_modes)
        )
        modes = dict(zip(("IN_1", "IN_2", "OUT_1", "OUT_2"), (*in_modes, *out_modes), strict=True))
        padded = {f"PADDED_{name}": _padded(mode) for name, mode in modes.items()}
        numbers = max(_token_numbers(in_modes), _token_numbers(out_modes))
        return {
            **modes,
            **padded,
            "TERMS": self.terms,
            "BLOCK": max(1, _LARGEST_BLOCK // (numbers * dtype.itemsize)),
            "num_warps": 4 if numbers <= 4096 else 8,
            "num_stages": 2,
        }

    def _takes(self, x: Tensor) -> bool:
        """Whether the kernels do it. Forward and backward agree: x and its gradient are alike."""
        numbers = _token_numbers(self.in_modes) + _token_numbers(self.out_modes)
        if x.dtype not in _DTYPES or numbers * x.dtype.itemsize > _LARGEST_TOKEN:
            return False
        return _INTERPRETED or (
            x.is_cuda and torch.version.hip is None and (x.dtype != torch.float32 or _tf32())
        )

    def _add(
        self, x: Tensor, factors: Sequence[Tensor], result: Tensor | None, scaling: float, transposed: bool
    ) -> Tensor:
        """result + scaling * dW x, or dW^T x; in place, or a new tensor if `result` is None."""
        constants = self.constants(x.dtype, transposed)
        add = result is not None
        if not add:
            result = x.new_empty(x.shape[0], self.in_features if transposed else self.out_features)
        plan = plan_contraction(self.in_modes, self.out_modes)
        if transposed:
            plan = plan_contraction(self.out_modes, self.in_modes)
        with torch.cuda.device_of(x):
            add_product[(triton.cdiv(x.shape[0], constants["BLOCK"]),)](
                x.contiguous(),
                *(factor.contiguous() for factor in factors),
                result.view(-1),  # an error unless it is contiguous
                x.shape[0],
                scaling,
                TRANSPOSED=transposed,
                SECOND_MODE_FIRST=plan.order == (1, 0),
                ADD=add,
                **constants,
            )
        return result

    def _gradients(
        self, x: Tensor, grad: Tensor, factors: Sequence[Tensor], needs: Sequence[bool], scaling: float
    ) -> list[Tensor | None]:
        """Of the factors, in their dtypes; None where not needed."""
        constants = self.constants(x.dtype)
        programs = min(triton.cdiv(x.shape[0], constants["BLOCK"]), max(1, _PROGRAMS // self.terms))
        sums = [
            x.new_empty(programs if need else 0, *factor.shape, dtype=torch.float32)
            for factor, need in zip(factors, needs, strict=True)
        ]
        with torch.cuda.device_of(x):
            factor_gradients[(programs, self.terms)](
                x.contiguous(),
                grad.contiguous(),
                *(factor.contiguous() for factor in factors),
                *sums,
                x.shape[0],
                FIRST=needs[0],
                SECOND=needs[1],
                **constants,
            )
        return [
            (total.sum(0) * scaling).to(factor.dtype) if need else None
            for total, factor, need in zip(sums, factors, needs, strict=True)
        ]


def _padded(mode: int) -> int:
    return max(16, triton.next_power_of_2(mode))


def _token_numbers(modes: tuple[int, int]) -> int:
    """Of one token, padded."""
    return math.prod(_padded(mode) for mode in modes)


def _tf32() -> bool:
    matmul = torch.backends.cuda.matmul
    # torch before 2.9 has the older name alone, from then on reading that one may raise
    return matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else bool(matmul.allow_tf32)


@cache
def triton_mode_product(in_modes: tuple[int, ...], out_modes: tuple[int, ...], terms: int) -> Product | None:
    """The kernels where there are two modes and both are small enough, else None."""
    if len(in_modes) != 2 or len(out_modes) != 2 or max(*in_modes, *out_modes) > _LARGEST_MODE:
        return None
    return TritonModeProduct(mode_product(in_modes, out_modes, terms), in_modes, out_modes, terms)
