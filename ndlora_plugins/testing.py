"""What every method must hold to: `check_method` for your own, before it meets a trainer.

>>> from ndlora_plugins.testing import check_method
>>> check_method("slora")
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ndlora_plugins.adapter import LayerAdapter, plan_layer
from ndlora_plugins.fused import cast_factors
from ndlora_plugins.options import adapter_options
from ndlora_plugins.schedules.base import Ranks
from ndlora_plugins.starts.base import Seen
from ndlora_plugins.structures.base import Factors

__all__ = ["LAYOUTS", "check_method"]

# in_features, out_features, and what else there is to know of the weight: linear, experts, a kernel, an embedding
LAYOUTS: tuple[tuple[int, int, dict[str, Any]], ...] = (
    (24, 18, {}),
    (13, 30, {}),
    (12, 30, {"leading": (3,)}),
    (36, 8, {"trailing": (3, 3)}),
    (20, 12, {"one_hot": True}),
)


def check_method(
    method: str,
    *,
    init_lora_weights: bool | str = True,
    options: Mapping[str, Any] | None = None,
    rank: int = 3,
    gradient: bool = False,
) -> None:
    """Hold a registered method to its laws, in float64 on small layers of every kind.

    The start leaves the layer as it is; `apply`, `product`, `lookup`, `norm` and the low-rank form are views of
    `delta`; the change since a start is the difference of two `delta`; gradients are those of `delta` and reach every
    factor that trains; a layer of 16 bit keeps its dtype; what is saved is enough to make the update again; a smaller
    rank is a slice; merging is adding.

    Args:
        method, init_lora_weights, options: as `NdLoraConfig` takes them.
        gradient: hand the start a gradient of the weight, for starts that read one.

    Raises:
        AssertionError: a law that does not hold, with the layer and the view.
        NdLoraValueError: the method cannot be planned on one of the layers.
    """
    for in_features, out_features, weight_axes in LAYOUTS:
        generator = torch.Generator().manual_seed(0)
        for anchor in ("snapshot", None):
            chosen = adapter_options(method, init_lora_weights, rank=rank, anchor=anchor, options=options)
            plan = plan_layer(chosen, in_features, out_features, "layer", **weight_axes)
            seen = Seen(
                weight=_random(generator, out_features, in_features),
                gradient=_random(generator, out_features, in_features) if gradient else None,
            )
            try:
                _check_start(plan, seen, chosen.start.moves and anchor is None)
                trained, frozen = _moved(plan, seen, generator)
                _check_views(plan, trained, frozen, generator)
                _check_gradients(plan, trained, frozen, generator)
                _check_dtypes(plan, trained, frozen, generator)
                _check_file(plan, trained, frozen, seen)
                _check_cut(plan, trained, frozen)
            except AssertionError as error:
                raise AssertionError(
                    f"method={method!r} on a layer of {out_features} x {in_features} {weight_axes or ''} with "
                    f"anchor={plan.anchor!r}: {error}"
                ) from error


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def _equal(found: Tensor, expected: Tensor, what: str) -> None:
    scale = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        found.to(expected.dtype),
        expected,
        rtol=1e-9,
        atol=1e-9 * max(scale, 1e-3),
        msg=lambda text: f"{what}: {text}",
    )


def _wide(tensors: Factors) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in tensors.items()}


def _moved(plan: LayerAdapter, seen: Seen, generator: torch.Generator) -> tuple[Factors, Factors]:
    """(trained, frozen) as after some training."""
    trained, frozen = plan.initialize(seen, torch.Generator().manual_seed(1))
    return {
        name: value.double() + 0.3 * _random(generator, *value.shape) for name, value in trained.items()
    }, _wide(frozen)


def _check_start(plan: LayerAdapter, seen: Seen, moves: bool) -> None:
    options = plan.layout.options
    declared, own = set(plan.method.factor_names(options)), {factor.name for factor in plan.structure.factors}
    assert declared <= own, (
        f"the record names the factors {sorted(declared)}, the structure has {sorted(own)}"
    )
    first, again = (plan.initialize(seen, torch.Generator().manual_seed(1)) for _ in range(2))
    for one, other in zip(first, again, strict=True):
        for name in one:
            assert torch.equal(one[name], other[name]), f"two starts with one generator differ in {name!r}"
    trained, frozen = map(_wide, first)
    assert moves or not plan.delta(trained, frozen).any(), "the start moves the layer"


def _check_views(plan: LayerAdapter, trained: Factors, frozen: Factors, generator: torch.Generator) -> None:
    delta = plan.delta(trained, frozen)
    outs, ins = plan.layout.out_features, plan.layout.in_features
    assert tuple(delta.shape) == (outs, ins), f"delta has the shape {tuple(delta.shape)}"
    x = _random(generator, 2, 5, ins)
    update, factors = plan.update(trained, frozen)
    _equal(update.apply(factors, x), x @ delta.T, "apply")
    empty = update.apply(factors, x[:0])
    assert tuple(empty.shape) == (0, 5, outs), f"apply of no tokens has the shape {tuple(empty.shape)}"
    output = _random(generator, 2, 5, outs)
    _equal(plan.add_update(output, trained, frozen, x, 0.5), output + 0.5 * x @ delta.T, "product")
    weight, bias = _random(generator, outs, ins), _random(generator, outs)
    found = plan.linear(weight, bias, trained, frozen, x, plan.scaling)
    _equal(found, F.linear(x, weight + plan.scaling * delta, bias), "merged")
    indices = torch.randint(ins, (3, 2), generator=generator)
    _equal(update.lookup(factors, indices), delta.T[indices], "lookup")
    _equal(torch.tensor(plan.delta_norm(trained, frozen), dtype=torch.float64), delta.norm(), "norm")
    low_rank = update.low_rank(factors)
    if low_rank is not None:
        _equal(low_rank[1] @ low_rank[0], delta, "low_rank")
    assert plan.multiply_adds > 0, "multiply_adds is not positive"
    if plan.layout.trailing:
        image = _random(generator, 2, ins // 9, 5, 5)
        expected = F.conv2d(image, delta.view(outs, -1, 3, 3), padding=1)
        found = update.convolve(
            factors, image, lambda y, w: F.conv2d(y, w, padding=1, groups=y.shape[1] // w.shape[1])
        )
        _equal(found, expected, "convolve")


def _check_gradients(
    plan: LayerAdapter, trained: Factors, frozen: Factors, generator: torch.Generator
) -> None:
    x = _random(generator, 5, plan.layout.in_features).requires_grad_()
    leaves = {name: value.clone().requires_grad_() for name, value in trained.items()}
    output = _random(generator, 5, plan.layout.out_features)
    weight = _random(generator, 5, plan.layout.out_features)  # of the outputs in the loss
    inputs = [x, *leaves.values()]
    expected = torch.autograd.grad((weight * (x @ plan.delta(leaves, frozen).T)).sum(), inputs)
    found = torch.autograd.grad((weight * plan.add_update(output, leaves, frozen, x, 1.0)).sum(), inputs)
    for name, one, other in zip(("x", *leaves), found, expected, strict=True):
        _equal(one, other, f"gradient of {name!r}")
        assert one.any(), f"no gradient reaches {name!r}"


def _check_dtypes(plan: LayerAdapter, trained: Factors, frozen: Factors, generator: torch.Generator) -> None:
    """Float32 factors on a layer of 16 bit, and under autocast."""
    weight = torch.zeros(plan.layout.out_features, plan.layout.in_features)
    x = _random(generator, 4, plan.layout.in_features)
    expected = x @ plan.delta(trained, frozen).T
    trained, frozen = cast_factors(trained, torch.float32), cast_factors(frozen, torch.float32)
    for dtype, autocast in ((torch.bfloat16, False), (torch.float16, False), (torch.float32, True)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = plan.linear(weight.to(dtype), None, trained, frozen, x.to(dtype), 1.0)
        kind = torch.bfloat16 if autocast else dtype
        assert found.dtype == kind, f"a layer of {kind} gives {found.dtype}"
        lost = (found.double() - expected).abs().max() / expected.abs().max()
        assert lost < 0.05, f"on a layer of {kind}, {lost:.0%} of the update are lost to rounding"


def _check_file(plan: LayerAdapter, trained: Factors, frozen: Factors, seen: Seen) -> None:
    """A pickled plan, another generator, and the numbers that are saved make the same update."""
    plan_again = pickle.loads(pickle.dumps(plan))
    assert plan_again == plan, "a pickled plan is another one"
    frozen_again = _wide(plan_again.initialize(seen, torch.Generator().manual_seed(2))[1])
    if not plan.recomputed:
        frozen_again = frozen
    _equal(
        plan_again.delta(trained, frozen_again), plan.delta(trained, frozen), "made again from what is saved"
    )


def _check_cut(plan: LayerAdapter, trained: Factors, frozen: Factors) -> None:
    """The first rank alone is what the whole structure makes of it where the others are zero."""
    structure, cut = plan.structure, replace(plan, layout=replace(plan.layout, rank=1))
    if not structure.rank_axes:
        return
    first = structure.cut_factors(trained, 1), structure.cut_factors(frozen, 1)
    for factor in cut.structure.factors:
        found = tuple((first[0] | first[1])[factor.name].shape)
        assert found == factor.shape, f"{factor.name!r} cut to rank 1 is {found}, not {factor.shape}"
    expected = plan.delta(_padded(first[0], trained), _padded(first[1], frozen))
    _equal(cut.delta(*first), expected, "cut to rank 1")
    _equal(plan.delta(trained, frozen, Ranks(1, scale=2.0)), 2 * expected, "the first rank alone")


def _padded(first: Factors, whole: Factors) -> dict[str, Tensor]:
    """The first ranks, and zeros for the later ones; integers as they are."""
    padded = dict(whole)
    for name, value in first.items():
        if value.is_floating_point():
            padded[name] = torch.zeros_like(whole[name])
            padded[name][tuple(map(slice, value.shape))] = value
    return padded
