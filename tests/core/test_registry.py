"""Methods and starts come in by pluggy, ours as anybody's; wrong names are explained."""

from dataclasses import replace

import pytest
import torch

from ndlora_plugins import hookimpl, register_plugin, registry, unregister_plugin
from ndlora_plugins.adapter import plan_layer
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.methods import Method
from ndlora_plugins.options import adapter_options
from ndlora_plugins.registry import method_and_start, methods, product_method, starts
from ndlora_plugins.starts import Start
from ndlora_plugins.structures import Chain, Factor, Structure

# init_lora_weights, method as given, method that follows
RESOLVED = [
    (True, None, "crossed"),
    (False, None, "crossed"),
    ("lora_step", None, "crossed"),
    ("n_lora", None, "nlora"),
    ("s_lora", None, "slora"),
    ("ndlinear", None, "ndlinear"),
    ("kronecker", None, "ndlinear"),
    ("n_lora", "inttune", "inttune"),
    ("n_lora", "slora", "slora"),
    ("lora_step", "crossed", "crossed"),
]
# method, init_lora_weights, what the error must say
REFUSED = [
    ("loha", True, "'ndlinear', .*'slora'.*entry-point group 'ndlora'"),
    (None, "pissa", "init_lora_weights='pissa' is no known start.*'n_lora'.*entry-point group"),
    ("inttune", "s_lora", "it starts 'up' at zero and the method keeps it frozen.*'n_lora'"),
    (
        "ndlinear",
        "n_lora",
        r"it gives the factors \['down', 'core', 'up'\], and the method has \['mode_1', 'mode_2'\]",
    ),
    (3, True, "method=3 is no known method"),
]


@pytest.mark.parametrize("init, method, expected", RESOLVED)
def test_the_method_follows_from_the_start(init, method, expected):
    assert method_and_start(method, init)[0].name == expected


@pytest.mark.parametrize("method, init, message", REFUSED)
def test_wrong_names_are_explained(method, init, message):
    with pytest.raises(NdLoraValueError, match=message):
        method_and_start(method, init)


class Diagonal(Structure):
    """dW = diag(scale), padded: as small as a structure can be."""

    def __init__(self, layout):
        self.layout = layout

    @property
    def factors(self):
        return (Factor("scale", (min(self.layout.in_features, self.layout.out_features),)),)

    @property
    def multiply_adds(self):
        return self.factors[0].numel

    def apply(self, factors, x):
        y = x[..., : self.multiply_adds] * factors["scale"]
        return torch.nn.functional.pad(y, (0, self.layout.out_features - self.multiply_adds))

    def delta(self, factors):
        return self.apply(factors, torch.eye(self.layout.in_features).to(factors["scale"])).T


diagonal = Method(
    name="diagonal",
    summary="scales each feature",
    source="this test",
    structure=Diagonal,
    factors=("scale",),
    start="zero_scale",
    rank=1,
)
zero_scale = Start(
    name="zero_scale",
    summary="zeros",
    source="this test",
    gives=("scale",),
    zero=("scale",),
    function=lambda structure, trains, seen, generator: {"scale": torch.zeros(structure.factors[0].shape)},
)


class Plugin:
    """A module of a third party; what it brings is given for each test."""

    def __init__(self, methods=(), starts=()):
        self.methods, self.starts = methods, starts

    @hookimpl
    def ndlora_methods(self):
        return self.methods

    @hookimpl
    def ndlora_starts(self):
        return self.starts


@pytest.fixture
def plugin():
    plugin = Plugin([diagonal], [zero_scale])
    register_plugin(plugin, name="in-test")
    yield plugin
    unregister_plugin(plugin)


def test_a_third_party_method_stands_beside_ours(plugin):
    assert list(methods())[0] == "crossed" and methods()["crossed"].plugin == "ndlora-plugins"
    assert methods()["diagonal"].plugin == "in-test"
    assert starts()["zero_scale"].plugin == "in-test"
    plan = plan_layer(adapter_options(method="diagonal", init_lora_weights=False), 8, 6, "q")
    trained, frozen = plan.initialize()
    x = torch.randn(3, 8)
    update, factors = plan.update(trained, frozen)
    torch.testing.assert_close(update.apply(factors, x), x @ plan.delta(trained, frozen).T)


def test_a_third_party_method_trains_through_peft(plugin, make_llama, tokens, tmp_path):
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


class Misspelt:
    @hookimpl
    def ndlora_method(self):
        return [diagonal]


class Asking:
    @hookimpl
    def ndlora_methods(self, config):
        return [diagonal]


# why, what the plugin brings -> what the error must say
REFUSED_PLUGINS = {
    "a hook that is none of ours": (
        Misspelt(),
        r"'ndlora_method' .* a plugin has the hooks \['ndlora_methods', ",
    ),
    "a hook that asks for something": (Asking(), "'another'.*ndlora_methods.*'config'.*without arguments"),
    "a method's name is taken": (
        Plugin([replace(diagonal, name="slora")]),
        "method 'slora' of plugin 'another' is already registered by 'ndlora-plugins': rename it",
    ),
    "a start's name is taken": (
        Plugin(starts=[replace(zero_scale, name="n_lora")]),
        "start 'n_lora' of plugin 'another' is already registered by 'ndlora-plugins': rename it",
    ),
    "no method": (Plugin([Diagonal]), "plugin 'another'.*Method"),
    "no start": (Plugin(starts=[diagonal]), "plugin 'another'.*Start"),
}


@pytest.mark.parametrize("refused, message", REFUSED_PLUGINS.values(), ids=REFUSED_PLUGINS)
def test_a_plugin_that_cannot_come_in_is_refused_and_changes_nothing(refused, message):
    before = dict(methods()), dict(starts())
    try:
        with pytest.raises(NdLoraValueError, match=message):
            register_plugin(refused, name="another")
        assert (methods(), starts()) == before
    finally:
        if registry._manager().is_registered(refused):
            unregister_plugin(refused)


def test_a_plugins_name_is_its_own(plugin):
    for given, name in ((Plugin(), "in-test"), (plugin, "another"), (plugin, None)):
        with pytest.raises(NdLoraValueError, match="^A plugin 'in-test' is already registered"):
            register_plugin(given, name=name)
    assert methods()["diagonal"].plugin == "in-test"


def test_what_is_not_registered_cannot_be_taken_out():
    with pytest.raises(NdLoraValueError, match="is no registered plugin"):
        unregister_plugin(Plugin())


# what a start leaves at zero and what trains -> what the error must say
MISFITS = [
    (("down", "up"), None, r"it starts \['down', 'up'\] at zero, so none of them would ever get a gradient"),
    (("up",), ("core",), "it starts 'up' at zero and the method keeps it frozen"),
]


@pytest.mark.parametrize("zero, trains, message", MISFITS)
def test_a_start_from_which_nothing_would_be_learned_is_refused(zero, trains, message):
    own = replace(methods()["slora"].value, name="own", trains=trains)
    plugin = Plugin([own], [replace(starts()["s_lora"].value, name="zeros", zero=zero)])
    register_plugin(plugin, name="zeros")
    try:
        with pytest.raises(NdLoraValueError, match=f"'zeros' cannot start method='own': {message}"):
            method_and_start("own", "zeros")
    finally:
        unregister_plugin(plugin)


def test_the_method_for_any_product_holds_one_of_any_rank():
    method, structure = product_method(24, 18, 5)
    assert isinstance(structure, Chain) and structure.down_rank == structure.up_rank == 5
    assert method.trains is None and methods()[method.name].value is method
