"""dW x added to the output of a layer: one autograd function for every method, with gradients of its own.

What plain autograd would do besides the products themselves is what costs: a pass over (tokens, out) for the sum
and one for the scaling, a pass over (tokens, in) for the sum of two gradients, copies for transposed axes, and
intermediates kept for backward. A `Product` adds into what is there instead, and keeps what LoRA keeps or less.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ndlora_plugins.errors import NdLoraValueError

__all__ = [
    "Product",
    "add_mm_",
    "add_product",
    "cast_factors",
    "compute_dtype",
    "linear_with_product",
    "plain_autograd",
]

Kept = tuple[Tensor, ...]
Gradients = list[Tensor | None]


class Product:
    """dW x for one structure of dW. Stateless: the tensors that dW is made of are handed over with every call.

    Attributes:
        in_features, out_features: of dW.
    """

    in_features: int
    out_features: int

    def plain(self, x: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """dW x by differentiable functions of torch alone: (..., in_features) -> (..., out_features)."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        tensors: Sequence[Tensor],
        needs: Sequence[bool],
        result: Tensor | None,
        scaling: float,
    ) -> tuple[Tensor, Kept]:
        """result + scaling * dW x.

        Args:
            x: (tokens, in_features), in the dtype to compute in.
            tensors: of any dtype.
            needs: for each tensor, whether `backward` will be asked for its gradient.
            result: (tokens, out_features), changed in place; None for a new one that starts at zero.

        Returns:
            the result, and what `backward` needs besides the tensors: x first, if it is needed.
        """
        raise NotImplementedError

    def add_few(self, tensors: Sequence[Tensor], result: Tensor, x: Tensor, scaling: float) -> None:
        """result += scaling * dW x, in place, for a few tokens of which no gradient is wanted: generation.

        What it costs then is the number of calls, not the numbers in them.

        Args:
            tensors: of one dtype.
            result: (..., out_features), contiguous.
            x: (..., in_features); both of the tensors' dtype.
        """
        tokens, result = x.reshape(-1, self.in_features), result.view(-1, self.out_features)
        self.forward(tokens, tensors, (False,) * len(tensors), result, scaling)

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
        """The gradients of x and of the tensors.

        Args:
            grad: (tokens, out_features), of the result.
            grad_x: (tokens, in_features) to add the gradient of x to, in place; None for a new one.

        Returns:
            the gradient of x, None unless `needs_x`; for each tensor its gradient in its dtype, or None.
        """
        raise NotImplementedError


def add_mm_(result: Tensor | None, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """result + scaling * left @ right in place, or a new tensor if `result` is None; matrices."""
    if result is None:
        return left.new_empty(left.shape[0], right.shape[1]).addmm_(left, right, beta=0, alpha=scaling)
    return result.addmm_(left, right, alpha=scaling)


def cast_factors(factors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The factors in a floating dtype; those that hold integers as they are."""
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in factors.items()}


def compute_dtype(x: Tensor, tensors: Sequence[Tensor], autocast: bool) -> torch.dtype:
    """The dtype that dW x is computed in.

    Under autocast it is autocast's. A bfloat16 x meets float32 tensors in bfloat16, which has float32's range:
    no copy of x is made and kept, long sums are float32 inside. Otherwise it is the tensors' dtype. A few tokens
    of which no gradient is wanted are cheaper to cast than the tensors.
    """
    if autocast and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    dtype = tensors[0].dtype
    narrow = x.dtype == torch.bfloat16 and dtype == torch.float32 and not _is_few(x)
    return torch.bfloat16 if narrow else dtype


_FEW_TOKENS = 64  # up to so many, what is done to the tensors costs more than what is done to x


def _is_few(x: Tensor) -> bool:
    """Whether x (..., in_features) is a few tokens of which no gradient is wanted."""
    return not torch.is_grad_enabled() and x.numel() <= _FEW_TOKENS * x.shape[-1]


class _Update(torch.autograd.Function):
    """F.linear(x, weight, bias) if there is a weight, or else `output` itself, plus scaling * dW x."""

    @staticmethod
    def forward(
        ctx: Any,
        product: Product,
        scaling: float,
        weight: Tensor | None,
        bias: Tensor | None,
        output: Tensor | None,
        x: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        needs_x, needs = ctx.needs_input_grad[5], ctx.needs_input_grad[6:]
        tokens = x.reshape(-1, product.in_features)
        if weight is not None:
            # F.linear(x, ..) may be a view if there is a bias, and a function's view nobody may change in place
            output = F.linear(tokens, weight, bias).resize_(*x.shape[:-1], product.out_features)
        elif output is not None:
            ctx.mark_dirty(output)
        result, kept = product.forward(tokens, tensors, needs, _flat(output), scaling)
        # x itself and not a view of it: a second derivative needs it as autograd knows it
        ctx.keeps_x = any(value is tokens for value in kept)
        kept = [x if value is tokens else value for value in kept]
        ctx.save_for_backward(weight if needs_x else None, *tensors, *kept)
        ctx.product, ctx.scaling, ctx.count, ctx.shape = product, scaling, len(tensors), x.shape
        return result.view(*x.shape[:-1], product.out_features) if output is None else output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight, *saved = ctx.saved_tensors
        tensors, kept = saved[: ctx.count], saved[ctx.count :]
        grad_x, grads = None, [None] * ctx.count
        if True in ctx.needs_input_grad[5:]:  # else `output` alone needs its gradient
            backward = _differentiable_backward if torch.is_grad_enabled() else _backward
            grad_x, grads = backward(ctx, grad, weight, tensors, kept)
        return None, None, None, None, grad if ctx.needs_input_grad[4] else None, grad_x, *grads


def _flat(result: Tensor | None) -> Tensor | None:
    """(..., out) -> (tokens, out), the same memory."""
    return None if result is None else result.view(-1, result.shape[-1])


def _backward(
    ctx: Any, grad: Tensor, weight: Tensor | None, tensors: Sequence[Tensor], kept: Sequence[Tensor]
) -> tuple[Tensor | None, Gradients]:
    needs_x, needs = ctx.needs_input_grad[5], ctx.needs_input_grad[6:]
    # (..., out) -> (tokens, out); (..., in) -> (tokens, in)
    grad = grad.reshape(-1, ctx.product.out_features)
    kept = [value.reshape(-1, value.shape[-1]) for value in kept]
    grad_x = None if weight is None else grad @ weight
    grad_x, grads = ctx.product.backward(kept, tensors, grad, needs, needs_x, grad_x, ctx.scaling)
    return None if grad_x is None else grad_x.view(ctx.shape), grads


def _differentiable_backward(
    ctx: Any, grad: Tensor, weight: Tensor | None, tensors: Sequence[Tensor], kept: Sequence[Tensor]
) -> tuple[Tensor | None, Gradients]:
    """The same out of plain autograd, for `create_graph=True`."""
    needs_x, needs = ctx.needs_input_grad[5], ctx.needs_input_grad[6:]
    if ctx.keeps_x:
        x = kept[0]
    elif any(needs):
        raise NdLoraValueError(
            "A second derivative (create_graph=True) of an adapter whose `down` is frozen: backward keeps the "
            "product with `down`, not the input. Run the forward within `ndlora_plugins.fused.plain_autograd()`."
        )
    else:  # dW x is linear in x: any x will do
        x = grad.new_zeros(ctx.shape, requires_grad=True)
    wanted = [x] * needs_x + [tensor for tensor, need in zip(tensors, needs, strict=True) if need]
    y = ctx.scaling * ctx.product.plain(x, [tensor.to(x.dtype) for tensor in tensors])
    found = list(torch.autograd.grad(y, wanted, grad, create_graph=True))
    grad_x = found.pop(0) if needs_x else None
    if weight is not None:  # kept where x needs its gradient
        grad_x = grad @ weight if grad_x is None else grad_x + grad @ weight
    return grad_x, [found.pop(0) if need else None for need in needs]


_by_autograd = ContextVar("by_autograd", default=False)


@contextmanager
def plain_autograd() -> Iterator[None]:
    """Compute updates by torch's own functions within this context: slower, with derivatives of any order."""
    token = _by_autograd.set(True)
    try:
        yield
    finally:
        _by_autograd.reset(token)


def _can_fuse(*tensors: Tensor | None) -> bool:
    # torch.compile fuses plain functions itself; subclasses (DTensor, quantised) bring their own products
    return (
        not torch.compiler.is_compiling()
        and not _by_autograd.get()
        and not _is_transforming()
        and _PLAIN.issuperset(map(type, tensors))
    )


_PLAIN = frozenset((Tensor, nn.Parameter, nn.Buffer, type(None)))
# torch has no public name for either; without them a transform ends in torch's own error, as it says for `_Update`
_in_functorch = getattr(torch._C, "_are_functorch_transforms_active", bool)


def _is_transforming() -> bool:
    """Whether `torch.func` (grad, vmap, jvp, ..) or forward-mode AD runs, which see through plain functions alone."""
    return _in_functorch() or getattr(forward_ad, "_current_level", -1) >= 0


def _run(
    product: Product,
    tensors: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    x: Tensor,
    scaling: float,
) -> Tensor:
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (output, x, *tensors)
    ):
        return _Update.apply(product, scaling, weight, bias, output, x, *tensors)
    if weight is not None:
        output = F.linear(x, weight, bias)
    if output is not None and _is_few(x) and x.dtype == tensors[0].dtype:
        product.add_few(tensors, output, x, scaling)
        return output
    tokens, needs = x.reshape(-1, product.in_features), (False,) * len(tensors)
    result, _ = product.forward(tokens, tensors, needs, _flat(output), scaling)
    return result.view(*x.shape[:-1], product.out_features) if output is None else output


def add_product(
    product: Product,
    tensors: Sequence[Tensor],
    output: Tensor,
    x: Tensor,
    scaling: float = 1.0,
    in_place: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """output + scaling * dW x.

    Args:
        tensors: that dW is made of; all floating, of one dtype.
        output: (..., out_features), any floating dtype.
        x: (..., in_features), any floating dtype.
        in_place: whether the memory of `output` may be taken for the result: nobody else reads it and what
            computed it does not need it for backward. Done where autograd and the dtypes allow it.
        dtype: to compute in; None for that of `compute_dtype`.

    Returns:
        (..., out_features), in output's dtype.
    """
    if dtype is None:
        dtype = compute_dtype(x, tensors, torch.is_autocast_enabled(x.device.type))
    given = output.dtype
    x = x.to(dtype)
    if not _can_fuse(output, x, *tensors):
        y = product.plain(x, [tensor.to(dtype) for tensor in tensors])
        return (output + (y if scaling == 1 else y * scaling)).to(given)
    if given != dtype == torch.promote_types(given, dtype):
        output, in_place = output.to(dtype), True  # a copy
    if in_place and output.dtype == dtype and _may_change(output):
        return _run(product, tensors, None, None, output, x, scaling).to(given)
    return (output + _run(product, tensors, None, None, None, x, scaling)).to(given)


def _may_change(output: Tensor) -> bool:
    if not output.is_contiguous():
        return False
    # changing a view makes autograd copy its gradient; a leaf that needs a gradient must not be changed
    return not torch.is_grad_enabled() or not (output._is_view() or (output.is_leaf and output.requires_grad))


def linear_with_product(
    product: Product,
    tensors: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    scaling: float = 1.0,
) -> Tensor:
    """F.linear(x, weight, bias) + scaling * dW x; backward adds into the gradient of x as forward does.

    Args:
        tensors: that dW is made of; all floating, of one dtype.
        weight: (out_features, in_features), frozen.
        bias: (out_features), frozen, or None.
        x: (..., in_features).

    Returns:
        (..., out_features).
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    dtype = compute_dtype(x, tensors, autocast)
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    if autocast:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if frozen and x.dtype == weight.dtype == dtype and _can_fuse(weight, bias, x, *tensors):
        return _run(product, tensors, weight, bias, None, x, scaling)
    return add_product(product, tensors, F.linear(x, weight, bias), x, scaling, True, dtype)
