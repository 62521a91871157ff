"""Every view of every structure: `Einsum` is the oracle of the fast ones, plain torch is the oracle of `Einsum`.

An equation says in one line what `Chain` and `KroneckerSum` compute each in its own way. All in float64.
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from ndlora_plugins.adapter import plan_layer
from ndlora_plugins.fused import add_product
from ndlora_plugins.options import adapter_options
from ndlora_plugins.structures import Chain, Einsum, KroneckerSum, Layout, Structure
from ndlora_plugins.structures.einsum import Equation, _best_cut


def einsum(layout, equation, sizes, names, ranked=""):
    return Einsum(layout, Equation.parse(equation), tuple(sizes.items()), tuple(names.split()), tuple(ranked))


def chain(equation, names, ranked, **options):
    layout = Layout(24, 18, 4)
    return Chain(layout, **options), einsum(layout, equation, {"out": 18, "in": 24}, names, ranked)


def kronecker_sum(in_modes, out_modes, terms):
    layout = Layout(math.prod(in_modes), math.prod(out_modes), terms)
    numbers = range(1, len(in_modes) + 1)
    factors = ", ".join(f"t out{k} in{k}" for k in numbers)
    result = " ".join([*(f"out{k}" for k in numbers), *(f"in{k}" for k in numbers)])
    sizes = {f"in{k}": in_modes[k - 1] for k in numbers} | {f"out{k}": out_modes[k - 1] for k in numbers}
    names = " ".join(f"mode_{k}" for k in numbers)
    oracle = einsum(layout, f"{factors} -> {result}", sizes, names, "t")
    return KroneckerSum(layout, in_modes, out_modes), oracle


FULL, DIAGONAL, NONE = "out r, r s, s in -> out in", "out r, r, r in -> out in", "out r, r in -> out in"
# structure and oracle; rank of the low-rank form; multiply-adds of a token
FAST = {
    "full core": (*chain(FULL, "up core down", "rs"), 4, 24 * 4 + 4 * 4 + 4 * 18),
    "diagonal core": (*chain(DIAGONAL, "up core down", "r", core="diagonal"), 4, 24 * 4 + 4 + 4 * 18),
    "no core": (*chain(NONE, "up down", "r", core="none"), 4, 24 * 4 + 4 * 18),
    "indexed down": (*chain(NONE, "up columns", "r", core="none", indexed=("down",)), 4, 4 * 18),
    "indexed up": (*chain(FULL, "rows core down", "rs", indexed=("up",)), 4, 24 * 4 + 4 * 4),
    "indexed sides": (*chain(DIAGONAL, "rows core columns", "r", core="diagonal", indexed=("down", "up")), 4, 4),
    "two modes": (*kronecker_sum((4, 6), (3, 6), 1), None, 24 * 3 + 18 * 6),
    "two modes, terms": (*kronecker_sum((6, 4), (9, 2), 3), None, 3 * (24 * 2 + 12 * 9)),
    "three modes, terms": (*kronecker_sum((2, 3, 4), (3, 3, 2), 4), None, 4 * (24 * 2 + 12 * 3 + 12 * 3)),
    "four modes": (*kronecker_sum((2, 2, 3, 2), (3, 1, 2, 3), 2), None, 2 * (24 * 1 + 12 * 2 + 8 * 3 + 12 * 3)),
    "crossed": (*kronecker_sum((2, 24), (16, 2), 1), 4, 48 * 2 + 4 * 16),
    "crossed, terms": (*kronecker_sum((2, 24), (16, 2), 2), 8, 2 * (48 * 2 + 4 * 16)),
    "crossed, five terms": (*kronecker_sum((2, 24), (16, 2), 5), None, 5 * (48 * 2 + 4 * 16)),
    "mirrored": (*kronecker_sum((24, 2), (2, 16), 1), 4, 48 * 2 + 4 * 16),
    "three modes cross": (*kronecker_sum((2, 2, 24), (24, 2, 2), 1), 8, 96 * 2 + 8 * 2 + 8 * 24),
}  # fmt: skip
SMALL, WIDE = Layout(24, 18, 2), Layout(32, 32, 1)
TRAIN = "out1 in1 a, a out2 in2 b, b out3 in3 -> out1 out2 out3 in1 in2 in3"
SHARED_OUT, SHARED_IN = "out1 out2 r, out1 r in -> out1 out2 in", "out r in1, r in1 in2 -> out in1 in2"
# structure; rank of the low-rank form; dW in torch's own letters
EQUATIONS = {
    "one factor": (einsum(SMALL, "out in -> out in", {"out": 18, "in": 24}, "whole"), None, "oi->oi"),
    "a tensor train": (
        einsum(SMALL, TRAIN, dict(out1=3, out2=3, out3=2, in1=4, in2=3, in3=2), "first second third", "ab"),
        None,
        "oix,xpjy,yqk->opqijk",
    ),
    "Tucker": (
        einsum(
            SMALL,
            "out1 a, out2 b, a b c, c in -> out1 out2 in",
            {"out1": 6, "out2": 3, "a": 3, "in": 24},
            "first second core down",
            "bc",
        ),
        2,
        "oa,pb,abc,ci->opi",
    ),
    "LoHa: dW's axes in two factors": (
        einsum(SMALL, "out r, r in, out s, s in -> out in", {"out": 18, "in": 24}, "up down up_2 down_2", "rs"),
        4,
        "or,ri,os,si->oi",
    ),
    "an out axis on both sides": (
        einsum(WIDE, SHARED_OUT, {"out1": 2, "out2": 16, "in": 32}, "up down", "r"), 2, "opr,ori->opi",
    ),
    "an in axis on both sides": (
        einsum(WIDE, SHARED_IN, {"out": 32, "in1": 2, "in2": 16}, "up down", "r"), 2, "ori,rij->oij",
    ),
    "names that the code may use": (
        einsum(SMALL, "out r, r tokens, tokens term3 in, term3 -> out in", {"out": 18, "in": 24, "term3": 3},
               "up core down scale", ("r", "tokens")),
        2, "oa,ab,bti,t->oi",
    ),
}  # fmt: skip


def trainable(structure):
    return [factor.name for factor in structure.factors if factor.indices is None]


STRUCTURES = (
    {name: case[0] for name, case in FAST.items()}
    | {f"{name}, as an equation": case[1] for name, case in FAST.items()}
    | {name: case[0] for name, case in EQUATIONS.items()}
)
LOW_RANK = {name: case[2] for name, case in FAST.items()}
LOW_RANK |= {f"{name}, as an equation": rank for name, rank in LOW_RANK.items()}
LOW_RANK |= {name: case[1] for name, case in EQUATIONS.items()}
# the fast structures and the further equations, with every set of factors that may change
CHANGES = [
    (name, names)
    for name in [*FAST, *EQUATIONS]
    for count in range(1, len(trainable(STRUCTURES[name])) + 1)
    for names in itertools.combinations(trainable(STRUCTURES[name]), count)
]
FUSED = [name for name in FAST if "indexed" not in name]
PLAIN = [name for name in STRUCTURES if name not in FUSED]

each = pytest.mark.parametrize("structure", STRUCTURES.values(), ids=STRUCTURES)
each_pair = pytest.mark.parametrize("structure, oracle", [case[:2] for case in FAST.values()], ids=list(FAST))
each_change = pytest.mark.parametrize("name, changing", CHANGES, ids=str)
close = torch.testing.assert_close


def random_factors(structure):
    return {
        factor.name: torch.randn(factor.shape, dtype=torch.float64)
        if factor.indices is None
        else torch.randperm(factor.indices)[: factor.numel]
        for factor in structure.factors
    }


def dense(structure, factors):
    """The factors as the oracle takes them: indices as the matrix that chooses these features."""
    matrices = {
        "columns": lambda indices: F.one_hot(indices, structure.layout.in_features).double(),
        "rows": lambda indices: F.one_hot(indices, structure.layout.out_features).T.double(),
    }
    indexed = [factor.name for factor in structure.factors if factor.indices is not None]
    return factors | {side: matrices[side](factors[side]) for side in indexed}


def random_input(structure, *shape):
    return torch.randn(*shape, structure.layout.in_features, dtype=torch.float64)


def shapes(factors):
    return {name: tuple(value.shape) for name, value in factors.items()}


def declared(structure):
    return {factor.name: factor.shape for factor in structure.factors}


@each_pair
def test_the_update_is_the_oracles(structure, oracle):
    factors = random_factors(structure)
    assert shapes(factors) == declared(structure)
    assert shapes(dense(structure, factors)) == declared(oracle)
    close(structure.delta(factors), oracle.delta(dense(structure, factors)))


@pytest.mark.parametrize("structure, _, letters", EQUATIONS.values(), ids=list(EQUATIONS))
def test_an_equations_update_is_torchs(structure, _, letters):
    factors = random_factors(structure)
    assert shapes(factors) == declared(structure)
    expected = torch.einsum(letters, *factors.values())
    close(structure.delta(factors), expected.reshape(structure.layout.out_features, -1))


@pytest.mark.parametrize("shape", [(), (0,), (2, 5)], ids=str)
@each
def test_apply(structure, shape):
    factors, x = random_factors(structure), random_input(structure, *shape)
    close(structure.apply(factors, x), x @ structure.delta(factors).T)


@each
def test_the_norm_and_the_lookup_and_what_they_are_by_default(structure):
    factors = random_factors(structure)
    delta, indices = structure.delta(factors), torch.randint(structure.layout.in_features, (3, 2))
    for kind in (type(structure), Structure):
        close(kind.norm(structure, factors), delta.norm())
        close(kind.lookup(structure, factors, indices), delta.T[indices])


@pytest.mark.parametrize("name, rank", [(name, rank) for name, rank in LOW_RANK.items() if rank])
def test_the_low_rank_form_is_exact(name, rank):
    structure = STRUCTURES[name]
    factors = random_factors(structure)
    down, up = structure.low_rank(factors)
    assert down.shape == (rank, structure.layout.in_features)
    close(up @ down, structure.delta(factors))


def test_the_cuts_of_an_equation_are_looked_at_once_for_layers_of_one_shape():
    # an export asks each layer, and a convolution each forward: of 13 factors they are 8190, half a second
    options = adapter_options("random_tucker", options={"num_modes": 3})
    cuts = []
    for layer in ("a", "b"):
        structure = plan_layer(options, 24, 18, layer).structure
        structure.low_rank(random_factors(structure))
        cuts.append(_best_cut.cache_info().misses)
    assert cuts[0] == cuts[1]


@pytest.mark.parametrize("name", [name for name, rank in LOW_RANK.items() if rank is None])
def test_a_low_rank_form_that_would_be_larger_than_the_update_is_none(name):
    assert STRUCTURES[name].low_rank(random_factors(STRUCTURES[name])) is None


def test_one_term_is_a_product_of_matrices_and_a_sum_is_none():
    one, several = STRUCTURES["three modes cross"], STRUCTURES["three modes, terms"]
    factors = random_factors(one)
    first, second, third = one.kronecker_matrices(factors)
    close(torch.kron(torch.kron(first, second), third), one.delta(factors))
    assert several.kronecker_matrices(random_factors(several)) is None


@each_pair
def test_a_smaller_rank_is_the_oracles(structure, oracle):
    factors, rank = random_factors(structure), (structure.layout.rank + 1) // 2
    cut, cut_factors = structure.cut(rank), structure.cut_factors(factors, rank)
    assert cut.layout.rank == rank and shapes(cut_factors) == declared(cut)
    expected = oracle.cut(rank).delta(oracle.cut_factors(dense(structure, factors), rank))
    close(cut.delta(cut_factors), expected)


@pytest.mark.parametrize("changing", [("mode_2",), ("mode_1", "mode_2")], ids=str)
@pytest.mark.parametrize("name", ["two modes, terms", "crossed"])
def test_the_units_of_a_sum_add_up_to_it(name, changing):
    structure = STRUCTURES[name].changed(frozenset(changing))
    assert structure.rank == len(changing) * STRUCTURES[name].layout.rank
    factors = random_factors(structure)
    parts = [{factor: value[k : k + 1] for factor, value in factors.items()} for k in range(structure.rank)]
    assert structure.unit == STRUCTURES[name].unit and shapes(parts[0]) == declared(structure.unit)
    close(sum(structure.unit.delta(part) for part in parts), structure.delta(factors))


@each
def test_a_sum_of_updates(structure):
    parts = [random_factors(structure) for _ in range(4)]
    three, four = structure.added(3), structure.added(2).added(2)
    added = structure.add(parts[:3])
    pairs = structure.added(2).add([structure.add(parts[:2]), structure.add(parts[2:])])
    assert shapes(added) == declared(three) and shapes(pairs) == declared(four)
    deltas = [structure.delta(part) for part in parts]
    close(three.delta(added), sum(deltas[:3]))
    close(four.delta(pairs), sum(deltas))
    x = random_input(structure, 5)
    close(four.apply(pairs, x), x @ sum(deltas).T)
    close(four.norm(pairs), sum(deltas).norm())


# dW(start + change) - dW(start)


def random_change(name, changing, scale=1.0):
    """(the whole start, the part of it that the change needs, the change)."""
    structure = STRUCTURES[name]
    start = random_factors(structure)
    needed = {factor: start[factor] for factor in structure.start_factors(frozenset(changing))}
    return start, needed, {factor: scale * torch.randn_like(start[factor]) for factor in changing}


def difference(structure, start, change):
    now = start | {name: start[name] + value for name, value in change.items()}
    return structure.delta(now) - structure.delta(start)


@each_change
def test_the_change_is_the_difference_of_two_updates(name, changing):
    structure = STRUCTURES[name]
    start, needed, change = random_change(name, changing)
    changed, factors = structure.changed(frozenset(changing)), structure.change(needed, change)
    assert shapes(factors) == declared(changed)
    expected, x = difference(structure, start, change), random_input(structure, 5)
    close(changed.delta(factors), expected)
    close(changed.apply(factors, x), x @ expected.T)
    close(changed.norm(factors), expected.norm())


@each_change
def test_no_change_is_exactly_zero_and_a_tiny_one_is_not_lost_to_rounding(name, changing):
    structure = STRUCTURES[name]
    start, needed, change = random_change(name, changing, scale=1e-14)
    changed, x = structure.changed(frozenset(changing)), random_input(structure, 5)
    none = structure.change(needed, {factor: torch.zeros_like(value) for factor, value in change.items()})
    assert torch.count_nonzero(changed.delta(none)) == torch.count_nonzero(changed.apply(none, x)) == 0
    first_order = sum(structure.delta(start | {factor: value}) for factor, value in change.items())
    close(1e14 * changed.delta(structure.change(needed, change)), 1e14 * first_order)


# factors that change -> the rank of the change's low-rank form where that of the update is 4
CHANGED_RANKS = {
    ("core",): 4,
    ("down", "core"): 4,
    ("core", "up"): 4,
    ("down", "up"): 8,
    ("down", "core", "up"): 8,
}


@pytest.mark.parametrize("changing, rank", CHANGED_RANKS.items(), ids=str)
@pytest.mark.parametrize("name", ["full core", "diagonal core"])
def test_the_low_rank_form_of_a_change_is_exact_and_small(name, changing, rank):
    _, needed, change = random_change(name, changing)
    changed, factors = STRUCTURES[name].changed(frozenset(changing)), STRUCTURES[name].change(needed, change)
    down, up = changed.low_rank(factors)
    assert len(down) == rank
    close(up @ down, changed.delta(factors))


# The products with gradients of their own


def assert_gradients(found, delta, factors, x):
    """`add_product` of what is found against plain autograd of dW (out, in), for all `factors` and x."""
    product, tensors = found
    output = torch.randn(*x.shape[:-1], len(delta), dtype=torch.float64)
    close(product.plain(x, tensors), x @ delta.T)
    results = add_product(product, tensors, output, x, 0.5), output + 0.5 * x @ delta.T
    close(*results)
    weights, inputs = torch.randn_like(output), [x, *factors.values()]
    close(*(torch.autograd.grad(result, inputs, weights, retain_graph=True) for result in results))


@pytest.mark.parametrize("name", FUSED)
def test_a_product_has_the_gradients_of_the_update(name):
    structure = STRUCTURES[name]
    factors = {name: value.requires_grad_() for name, value in random_factors(structure).items()}
    x = random_input(structure, 2, 5).requires_grad_()
    assert_gradients(structure.product(factors), structure.delta(factors), factors, x)


@pytest.mark.parametrize("name, changing", [case for case in CHANGES if case[0] in FUSED], ids=str)
def test_the_product_of_a_change_has_the_gradients_of_the_difference(name, changing):
    structure = STRUCTURES[name]
    start, needed, change = random_change(name, changing)
    change = {factor: value.requires_grad_() for factor, value in change.items()}
    x = random_input(structure, 2, 5).requires_grad_()
    assert_gradients(
        structure.change_product(needed, change), difference(structure, start, change), change, x
    )


@pytest.mark.parametrize("name", PLAIN)
def test_without_a_product_there_is_none_of_the_change(name):
    structure = STRUCTURES[name]
    _, needed, change = random_change(name, trainable(structure))
    assert structure.product(random_factors(structure)) is None
    assert structure.change_product(needed, change) is None


@pytest.mark.parametrize("structure, oracle, _, expected", FAST.values(), ids=list(FAST))
def test_multiply_adds(structure, oracle, _, expected):
    assert structure.multiply_adds == expected
    assert oracle.multiply_adds > 0


@pytest.mark.parametrize("num_modes", [2, 3, 4])
def test_a_tensor_train_is_its_bonds_contracted(num_modes):
    options = adapter_options("tensor_train", rank=3, options={"num_modes": num_modes})
    structure = plan_layer(options, 24, 18, "q").structure
    factors = {factor.name: torch.randn(factor.shape, dtype=torch.float64) for factor in structure.factors}
    # (out, in) of the modes so far and the bond behind them; the first and the last factor have no outer bond
    product = factors["train_1"].movedim(-1, 0)
    for k in range(2, num_modes):
        product = torch.stack(
            [
                sum(torch.kron(product[a], factors[f"train_{k}"][a, :, :, b]) for a in range(3))
                for b in range(3)
            ]
        )
    expected = sum(torch.kron(product[a], factors[f"train_{num_modes}"][a]) for a in range(3))
    torch.testing.assert_close(structure.delta(factors), expected)
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(structure.apply(factors, x), x @ expected.T)
