"""Methods and initialisers come in by pluggy, ours as anybody's; wrong names are explained."""

import pytest
import torch

from ndlora_plugins import hookimpl, register_plugin, unregister_plugin
from ndlora_plugins.adapter import AdapterOptions, plan_layer
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.initializers import Initializer
from ndlora_plugins.methods import Factor, Method
from ndlora_plugins.registry import initializers, method_and_initializer, methods

# init_lora_weights, method as given, method that follows
RESOLVED = [
    (True, None, "ndlinear"),
    (False, None, "ndlinear"),
    ("n_lora", None, "nlora"),
    ("s_lora", None, "slora"),
    ("ndlinear", None, "ndlinear"),
    ("n_lora", "inttune", "inttune"),
    ("n_lora", "slora", "slora"),
]
# method, init_lora_weights, what the error must say
REFUSED = [
    ("loha", True, "'ndlinear' .ndlora-plugins., 'slora'.*entry-point group 'ndlora'"),
    (None, "pissa", "init_lora_weights='pissa' is no known initialiser.*'n_lora'.*entry-point group"),
    ("inttune", "s_lora", "the core would never get a gradient.*'n_lora'"),
    ("ndlinear", "n_lora", "it starts nlora, slora, inttune only"),
    (3, True, "method=3 is no known method"),
]


@pytest.mark.parametrize("init, method, expected", RESOLVED)
def test_the_method_follows_from_the_initialiser(init, method, expected):
    assert method_and_initializer(method, init)[0].name == expected


@pytest.mark.parametrize("method, init, message", REFUSED)
def test_wrong_names_are_explained(method, init, message):
    with pytest.raises(NdLoraValueError, match=message):
        method_and_initializer(method, init)


class Diagonal(Method):
    """dW = diag(scale), padded: as small as a method can be."""

    name = "diagonal"
    summary = "scales each feature"
    source = "this test"
    default_rank = 1
    default_initializer = "zero_scale"

    def factors(self, layout):
        return (Factor("scale", (min(layout.in_features, layout.out_features),), fan_in=1),)

    def apply(self, layout, factors, x):
        size = factors["scale"].shape[0]
        y = x[..., :size] * factors["scale"]
        return torch.nn.functional.pad(y, (0, layout.out_features - size))

    def delta(self, layout, factors):
        delta = factors["scale"].new_zeros(layout.out_features, layout.in_features)
        delta.fill_diagonal_(1.0)
        return delta * torch.nn.functional.pad(
            factors["scale"], (0, layout.in_features - factors["scale"].shape[0])
        )

    def multiply_adds(self, layout):
        return min(layout.in_features, layout.out_features)


class Plugin:
    @hookimpl
    def ndlora_methods(self):
        return [Diagonal()]

    @hookimpl
    def ndlora_initializers(self):
        def zero(method, layout, weight, generator):
            return {factor.name: torch.zeros(factor.shape) for factor in method.factors(layout)}

        return [Initializer("zero_scale", "zeros", "this test", ("diagonal",), False, True, zero)]


class Clashing:
    @hookimpl
    def ndlora_methods(self):
        clash = Diagonal()
        clash.name = "slora"
        return [clash]


@pytest.fixture
def plugin():
    plugin = Plugin()
    register_plugin(plugin, name="in-test")
    yield plugin
    unregister_plugin(plugin)


def test_a_third_party_method_stands_beside_ours(plugin):
    assert list(methods())[:4] == ["ndlinear", "slora", "nlora", "inttune"]
    assert methods()["diagonal"].plugin == "in-test"
    assert initializers()["zero_scale"].plugin == "in-test"
    plan = plan_layer(AdapterOptions(method="diagonal", init_lora_weights=False), 8, 6, "q")
    trained, frozen = plan.initialize(None)
    x = torch.randn(3, 8)
    torch.testing.assert_close(plan.apply(trained, frozen, x), x @ plan.delta(trained, frozen).T)


def test_a_fifth_method_trains_through_peft(plugin, make_llama, tokens, tmp_path):
    from peft import PeftModel, get_peft_model

    from ndlora_plugins import NdLoraConfig

    base = make_llama()
    before = base(tokens).logits
    model = get_peft_model(base, NdLoraConfig(method="diagonal", task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(5):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    trained = model.eval()(tokens).logits
    assert not torch.equal(trained, before)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(PeftModel.from_pretrained(make_llama(), tmp_path)(tokens).logits, trained)


def test_gone_after_unregistering(plugin):
    unregister_plugin(plugin)
    assert "diagonal" not in methods()
    register_plugin(plugin, name="in-test")


def test_a_name_that_is_taken_is_refused_and_changes_nothing():
    with pytest.raises(
        NdLoraValueError, match="'slora' of plugin 'clashing' is already registered by 'ndlora-plugins'"
    ):
        register_plugin(Clashing(), name="clashing")
    assert methods()["slora"].plugin == "ndlora-plugins"
