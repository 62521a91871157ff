"""What the options may be, and the sentence that each wrong one gets before anything is made."""

import pytest

from ndlora_plugins.adapter import plan_layer
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.options import adapter_options
from ndlora_plugins.structures.einsum import Equation

EQUATION = "out r, r s, s in -> out in"
# arguments of `adapter_options`, what the error must say
REFUSED = [
    ({"rank": 0}, "r=0: a rank must be an integer of at least 1"),
    ({"rank": True}, "r=True: a rank must be an integer"),
    ({"rank": 2.0}, "r=2.0: a rank must be an integer"),
    ({"anchor": "later"}, r"anchor='later': choose one of \['snapshot', 'none'\]"),
    ({"options": 3}, "options=3: give a mapping of the method's own options"),
    ({"method": "slora", "options": {"size": 1}}, "method='slora' has no such option; it has none"),
    (
        {"method": "ndlinear", "options": {"size": 1}},
        "options={'size': ...}: method='ndlinear' has no such option; it has 'num_modes', 'crossed_modes', 'in_modes'",
    ),
    ({"method": "ndlinear", "options": {"num_modes": 0}}, "num_modes=0: choose an integer of at least 1"),
    ({"method": "ndlinear", "options": {"num_modes": True}}, "num_modes=True: choose an integer"),
    ({"method": "ndlinear", "options": {"crossed_modes": 0}}, "crossed_modes=0: choose an integer of at least 1"),
    ({"method": "crossed", "options": {"crossed_modes": True}}, "crossed_modes=True: choose an integer"),
    ({"method": "ndlinear", "options": {"in_modes": 24}}, "in_modes=24: give a list of integers"),
    ({"method": "ndlinear", "options": {"out_modes": "3x6"}}, "out_modes='3x6': give a list of integers"),
    ({"method": "random_tucker", "options": {"num_modes": 4}}, "num_modes=4: choose an integer from 2 to 3"),
    ({"method": "einsum"}, "method='einsum': .*'equation'"),
    ({"method": "einsum", "options": {"equation": EQUATION, "sizes": {"t": 2}}}, "sizes={'t': 2}: 't' must be an axis"),
    ({"method": "einsum", "options": {"equation": EQUATION, "sizes": {"s": 0}}}, "sizes={'s': 0}: 's' must be"),
    ({"method": "einsum", "options": {"equation": EQUATION, "sizes": ["s"]}}, r"sizes=\['s'\]"),
    ({"method": "einsum", "options": {"equation": EQUATION, "sizes": 4}}, "sizes=4: give a mapping"),
    ({"method": "einsum", "options": {"equation": EQUATION, "sizes": ("abc",)}}, r"sizes=\('abc',\): give a mapping"),
    ({"method": "einsum", "options": {"equation": EQUATION, "names": ["up", "down"]}}, "has 3 factors; give each"),
    ({"method": "einsum", "options": {"equation": EQUATION, "names": ["a", "a", "b"]}}, "give each a name of its own"),
    ({"method": "einsum", "options": {"equation": EQUATION, "names": ["a.b", "c", "d"]}}, "letters, digits and unders"),
    ({"method": "einsum", "options": {"equation": EQUATION, "trains": ["up"]}}, r"trains=\['up'\]: name at least one"),
    ({"method": "einsum", "options": {"equation": EQUATION, "trains": []}}, r"trains=\[\]: name at least one of"),
]  # fmt: skip
# equation, what is wrong with it
WRONG_EQUATIONS = [
    ("out r, r in", "it needs one '->', with the factors before it"),
    ("out r -> r in -> out in", "it needs one '->'"),
    ("", "it needs one '->'"),
    (None, "it needs one '->'"),
    ("out r, r in -> in out", "behind '->' stand the axes named out..., then those named in..."),
    ("out r, r in -> out", "at least one of each"),
    ("out r, r in -> out in r", "behind '->' stand the axes named out"),
    ("out r,, r in -> out in", "a factor has no axes"),
    ("out r r, r in -> out in", "'out r r' has an axis twice"),
    ("out r, r in -> out in in", "'out in in' has an axis twice"),
    ("out r', r' in -> out in", r'"r\'" is no name of an axis: use letters, digits and underscores'),
    ("...out r, r in -> out in", "'...out' is no name of an axis"),
    ("out r, r -> out in", "no factor has the axis 'in'"),
    ("out r, r in" + 11 * ", r" + " -> out in", "it has more than 12 factors"),
    ("out r, s in -> out in", "the axis 'r' is in one factor only, which it would sum up"),
    ("out r, r in, in2 in -> out in", "the axis 'in2' is in one factor only"),
    (
        "out r in2, in2 r in -> out in",
        "the axis 'in2' is named as one of dW's, but does not stand behind '->'",
    ),
]
# method, options, layer's axes before and after; what the error of a layer 'q' of 18 x 24 must say
REFUSED_LAYERS = [
    ("ndlinear", {"num_modes": 1}, {}, "1 modes: at least 2 are needed"),
    ("ndlinear", {"in_modes": [24], "out_modes": [18]}, {}, "1 modes: at least 2 are needed"),
    (
        "ndlinear", {"in_modes": [2, 12], "out_modes": [3, 6]}, {"leading": (3,), "trailing": (2,)},
        r"0 modes beside its own axes \[3, 2\]: at least 1 is needed",
    ),
    ("ndlinear", {"in_modes": [4, 6], "out_modes": [3, 3, 2]}, {}, r"in_modes=\[4, 6\] and out_modes=\[3, 3, 2\] must"),
    ("ndlinear", {"in_modes": [4, 5]}, {}, r"in_modes=\[4, 5\] multiply to 20.*in_features=24.*\[4, 6\]"),
    ("ndlinear", {"out_modes": [4, 5]}, {}, r"out_modes=\[4, 5\] multiply to 20.*out_features=18.*\[3, 6\]"),
    ("einsum", {"equation": EQUATION, "sizes": {"in": 20}}, {}, r"in_modes=\[20\] multiply to 20.*in_features=24"),
    (
        "einsum", {"equation": "out1 out2 r, r in -> out1 out2 in", "sizes": {"out1": 3}}, {},
        r"sizes={'out1': 3} of equation=.* has \['out1'\] without \['out2'\]: give all or none",
    ),
]  # fmt: skip
# arguments of `adapter_options` -> what the error of a layer 'q' of 18 x 24 must say of its factors
TOO_MANY = r"method='rows' chooses 19 different features with r=19, and layer 'q' of 18 x 24 .* has 18 of them. Lower r"
REFUSED_FACTORS = [
    (
        {"method": "einsum", "options": {"equation": "out r, r in -> out in", "names": ["b", "keys"]}},
        "method='einsum' keeps 'keys' of layer 'q' under 'keys': a key .* is no name that nn.ParameterDict has",
    ),
    ({"method": "rows", "rank": 19}, TOO_MANY),
    ({"method": "rows", "rank": 19, "init_lora_weights": False}, TOO_MANY),
    ({"method": "rows", "rank": 19, "init_lora_weights": "first_zero"}, TOO_MANY),
]
# options of "einsum" -> the factors of a layer of 18 x 24 with r=4
DECLARED = [
    (
        {"equation": EQUATION},
        {"factor_1": (18, 4), "factor_2": (4, 4), "factor_3": (4, 24)},
    ),
    (
        {"equation": EQUATION, "sizes": {"s": 16}, "names": ["up", "core", "down"]},
        {"up": (18, 4), "core": (4, 16), "down": (16, 24)},
    ),
    (  # pairs as Python has them, and as they come back from JSON
        {"equation": EQUATION, "sizes": (("r", 2), ["s", 3])},
        {"factor_1": (18, 2), "factor_2": (2, 3), "factor_3": (3, 24)},
    ),
    (
        {"equation": "r out1 in1, r out2 in2 -> out1 out2 in1 in2"},
        {"factor_1": (4, 3, 4), "factor_2": (4, 6, 6)},
    ),
    (
        {"equation": "a out1 in1, a out2 in2 -> out1 out2 in1 in2", "sizes": {"a": 2, "in1": 2, "in2": 12}},
        {"factor_1": (2, 3, 2), "factor_2": (2, 6, 12)},
    ),
]


@pytest.mark.parametrize("arguments, message", REFUSED, ids=str)
def test_what_cannot_work_is_refused(arguments, message):
    with pytest.raises(NdLoraValueError, match=message):
        adapter_options(**arguments)


@pytest.mark.parametrize("equation, reason", WRONG_EQUATIONS)
def test_an_equation_that_is_no_multilinear_form(equation, reason):
    with pytest.raises(NdLoraValueError) as caught:
        Equation.parse(equation)
    assert str(caught.value).startswith(f"equation={equation!r} is no multilinear form: ")
    assert reason.replace("\\", "") in str(caught.value) and f"Write it as '{EQUATION}'" in str(caught.value)


@pytest.mark.parametrize("method, options, axes, message", REFUSED_LAYERS, ids=str)
def test_what_cannot_work_on_a_layer_names_the_layer(method, options, axes, message):
    chosen = adapter_options(method, options=options)
    with pytest.raises(NdLoraValueError, match=rf"^Layer 'q', 18 x 24 \(out x in\): .*{message}"):
        plan_layer(chosen, 24, 18, "q", **axes)


@pytest.mark.parametrize("arguments, message", REFUSED_FACTORS, ids=str)
def test_factors_that_nothing_can_hold_are_refused(arguments, message):
    with pytest.raises(NdLoraValueError, match=message):
        plan_layer(adapter_options(**arguments), 24, 18, "q")


@pytest.mark.parametrize("options, factors", DECLARED, ids=str)
def test_an_equation_declares_its_factors(options, factors):
    planned = plan_layer(adapter_options("einsum", rank=4, options=options), 24, 18, "q")
    assert {factor.name: factor.shape for factor in planned.structure.factors} == factors
    assert planned.trained == planned.structure.factors


def test_an_equation_may_freeze_factors():
    options = {"equation": EQUATION, "names": ["up", "core", "down"], "trains": ["core"]}
    planned = plan_layer(adapter_options("einsum", rank=4, options=options), 24, 18, "q")
    assert [factor.name for factor in planned.trained] == ["core"]
    assert [factor.name for factor in planned.frozen] == ["up", "down"]
