"""Random configurations: our own error before anything is changed, or an adapter that comes back as it was saved."""

import json
import re
import tempfile
import warnings
from dataclasses import fields

import pytest
import torch
from hypothesis import event, example, given
from hypothesis import strategies as st
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraError
from ndlora_plugins.registry import methods, starts

FEATURES, TOKENS, EXPERTS = 12, 10, 3
INDICES = torch.tensor([[0, 1, 2, 3, 4], [9, 8, 7, 6, 5]])


class Block(nn.Module):
    """Every kind of layer that can be adapted, on (batch, positions, features)."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(FEATURES, 18)
        self.output = nn.Linear(18, FEATURES, bias=False)
        self.gate = Conv1D(FEATURES, FEATURES)
        self.convolution = nn.Conv1d(FEATURES, FEATURES, 3, padding=1)
        self.grouped = nn.Conv1d(FEATURES, FEATURES, 3, padding=1, groups=2)
        self.image = nn.Conv2d(1, 2, 3, padding=1)
        self.experts = Experts()
        self.norm = nn.LayerNorm(FEATURES)

    def forward(self, x):
        x = x + self.output(torch.tanh(self.query(self.norm(x))) * 0.5)
        x = x + torch.tanh(self.gate(x))
        x = x + self.grouped(torch.tanh(self.convolution(x.mT))).mT
        x = x + self.image(x[:, None]).mean(1)
        return x + self.experts(x)


class Experts(nn.Module):
    """Bare parameters: a stack of matrices, as in mixtures of experts, and one matrix."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, FEATURES, FEATURES) / 10)
        self.mix = nn.Parameter(torch.randn(FEATURES, FEATURES) / 10)

    def forward(self, x):
        return torch.einsum("bpi,eoi->bpo", x, self.up) @ self.mix


class Model(PreTrainedModel):
    """Two blocks between an embedding and a head."""

    config_class = PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(TOKENS, FEATURES)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = nn.Linear(FEATURES, TOKENS, bias=False)

    def get_input_embeddings(self):
        return self.embed_tokens

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        return {"input_ids": input_ids}

    def forward(self, input_ids, **kwargs):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def make_model():
    """The same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model(PretrainedConfig(tie_word_embeddings=False)).eval()


NAN, INFINITY = float("nan"), float("inf")
# of PEFT's own fields, and where nothing is adapted
PEFT_SAYS = (
    "not found in the base model|No `target_modules` passed|No modules were targeted|All modules were excluded|"
    "cannot be applied to modules of type|already marked to be trained fully|"
    "which is not a valid target"
)
# of no field, or of another one
JUNK = st.sampled_from(
    [None, True, False, 0, -1, 1, 3, 2.5, NAN, INFINITY, 10**9, 10**30, 10**400]
    + ["", "(", "false", "query", "none", b"query", (), [], [1], ["query"], [None], [[1]], {}, {"query": 2}]
    + [{"(": 1}, {"query": NAN}, {"in_modes": [3, 4]}, {1: [2]}, {None: 1}, object()]
)
LAYERS = ["query", "output", "gate", "convolution", "grouped", "image", "embed_tokens", "lm_head"]
NAMES = st.sampled_from([*LAYERS, "layers.0.query", "layers.1.gate", "norm", "experts", "nothing", ""])
PATTERNS = st.one_of(
    NAMES, st.sampled_from([r"layers\.\d+\.query", ".*output", "query|gate", "^query", "(a|b)+"])
)
REGEXES = st.sampled_from(
    [r".*\.(query|gate)", r"layers\.0\..*", "all-linear", ".*", "embed_tokens|lm_head", "x"]
)
RANKS = st.sampled_from([1, 2, 3, 8, 12, 13, 40, 1000, 10**6])
ALPHAS = st.sampled_from([0, 1, 16, 0.5, -2.0, 1e-40, 1e9, 1e10])
MODES = st.lists(st.sampled_from([1, 2, 3, 4, 6, 12, 18]), min_size=1, max_size=4)
SIDES = st.dictionaries(st.sampled_from(["in_modes", "out_modes"]), st.one_of(MODES, st.none()), min_size=1)
FITTING = st.sampled_from(
    [{"in_modes": [3, 4]}, {"in_modes": [2, 6], "out_modes": [3, 4]}, {"out_modes": [2, 2, 3]}]
)
EQUATIONS = st.sampled_from(
    [
        "out r, r in -> out in",
        "out r, r s, s in -> out in",
        "out_1 r in_1, r out_2 in_2 -> out_1 out_2 in_1 in_2",
    ]
    + ["out r, r in -> out", "out in -> out in", "out r, in -> out in", ""]
)
# of a method that has them, and of one that has not
OPTIONS = st.one_of(
    st.fixed_dictionaries({"equation": EQUATIONS}, optional={"sizes": st.just({"r": 2}), "trains": MODES}),
    st.fixed_dictionaries({"num_modes": st.sampled_from([2, 3, 0])}, optional={"crossed_modes": st.just(2)}),
    FITTING,
    st.fixed_dictionaries({"share": st.sampled_from(["all", "kind", "shape", "none"])}),
    st.fixed_dictionaries({"core": st.sampled_from(["full", "tucker", "diagonal"])}),
    st.fixed_dictionaries({"num_modes": st.sampled_from([2, 3])}, optional={"order": st.just("sides")}),
    st.fixed_dictionaries({"bases": st.sampled_from([1, 4, 0])}),
    st.fixed_dictionaries({"kernel_rank": st.sampled_from([1, 2, 0])}),
)
TOKEN_ROWS = st.lists(st.sampled_from([0, 1, 2, 9, -1, 10, 10**6]), max_size=3)
MODULES = st.lists(
    st.sampled_from(["lm_head", "norm", "layers.0.norm", "embed_tokens", "query", "nothing"]), max_size=2
)
FLAGS = st.sampled_from([True, False, None])
# field -> values of its kind: usual ones, those on the border, and some that do not fit the others or the model
VALUES = {
    "method": st.sampled_from([None, *methods()]),
    "r": RANKS,
    "lora_alpha": ALPHAS,
    "lora_dropout": st.sampled_from([0, 0.0, 0.5, 0.999]),
    "init_lora_weights": st.sampled_from([None, True, False, *starts()]),
    "anchor": st.sampled_from([None, "snapshot", "none"]),
    "options": OPTIONS,
    "num_modes": st.sampled_from([2, 3, 4, 7, 32]),
    "crossed_modes": st.sampled_from([1, 2, 4, 7, 10**30]),
    "modes": st.one_of(FITTING, SIDES, st.dictionaries(PATTERNS, st.one_of(FITTING, SIDES), max_size=2)),
    "random_seed": st.sampled_from([0, 7, -1, 2**70]),
    "target_modules": st.one_of(st.lists(NAMES, max_size=3), REGEXES, st.just(LAYERS)),
    "exclude_modules": st.one_of(st.lists(NAMES, max_size=2), REGEXES),
    "layers_to_transform": st.one_of(st.integers(-1, 2), st.lists(st.integers(-1, 2), max_size=2)),
    "layers_pattern": st.one_of(st.sampled_from(["layers", "blocks", ""]), st.lists(PATTERNS, max_size=2)),
    "rank_pattern": st.dictionaries(PATTERNS, RANKS, max_size=2),
    "alpha_pattern": st.dictionaries(PATTERNS, ALPHAS, max_size=2),
    "modules_to_save": MODULES,
    "bias": st.sampled_from(["none", "all", "ndlora_only", "lora_only"]),
    "fan_in_fan_out": FLAGS,
    "use_rslora": FLAGS,
    "trainable_token_indices": st.one_of(TOKEN_ROWS, st.dictionaries(NAMES, TOKEN_ROWS, max_size=2)),
    "target_parameters": st.lists(
        st.sampled_from(["experts.up", "experts.mix", "query.weight", "bias", "x"]), max_size=2
    ),
    "ensure_weight_tying": FLAGS,
    "save_frozen": FLAGS,
    "schedules": st.one_of(
        st.sampled_from(["nested_rank", "keep_close", "nope"]),
        st.lists(st.sampled_from(["sparse_ranks", "group_lasso"]), max_size=2),
        st.dictionaries(
            st.sampled_from(["anneal_rank", "reorthogonalise"]), st.sampled_from([None, {}, {"every": 2}])
        ),
    ),
    "gradient_batches": st.sampled_from([0, 1, 8]),
    "base_fingerprint": st.none(),
    "checksums": st.none(),
    "weight_forms": st.none(),
    "layers": st.none(),
    "schema_version": st.sampled_from([1, 2]),
    "task_type": st.sampled_from([None, "CAUSAL_LM", "FEATURE_EXTRACTION", "NOPE"]),
    "peft_type": st.sampled_from([None, "NDLORA", "LORA"]),
    "auto_mapping": st.sampled_from([None, {"base_model_class": "Model"}]),
    "peft_version": st.sampled_from([None, "0.20.0"]),
    "base_model_name_or_path": st.sampled_from([None, "base"]),
    "revision": st.sampled_from([None, "main"]),
    "inference_mode": st.booleans(),
}


@st.composite
def configurations(draw):
    """A few fields with values of their kind, often on all layers; in one of four a field with any value at all."""
    names = draw(st.sets(st.sampled_from(sorted(VALUES)), max_size=6))
    options = {"target_modules": LAYERS} if draw(st.booleans()) else {}
    options |= {name: draw(VALUES[name]) for name in sorted(names)}
    if draw(st.integers(0, 3)) == 0:
        options[draw(st.sampled_from(sorted(VALUES)))] = draw(JUNK)
    return options


def contents(model):
    """What a model is, by name: its modules, tensors and what trains."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return (
        [(name, id(module)) for name, module in model.named_modules()],
        trains,
        tensors,
        hasattr(model, "peft_config"),
    )


def same(found, expected):
    """Whether two results of `contents` are equal, bit by bit."""
    tensors = zip(found[2].values(), expected[2].values(), strict=True)
    return (
        found[:2] == expected[:2]
        and found[3:] == expected[3:]
        and all(torch.equal(*pair) for pair in tensors)
    )


def values(config):
    """The fields that a training and a load leave alone, as JSON has them."""
    left_alone = {
        "base_fingerprint",
        "checksums",
        "weight_forms",
        "inference_mode",
        "base_model_name_or_path",
        "auto_mapping",
    }
    items = config.to_dict().items()
    return json.loads(
        json.dumps({k: sorted(v) if isinstance(v, set) else v for k, v in items if k not in left_alone})
    )


def promises_the_base(config, options):
    """Whether an adapter leaves the model's function as it is before it is trained."""
    return options.get("anchor") != "none" and not config.resolved().start.moves


def shake(model):
    """Another value for everything that trains, and for what would if it were not for inference."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad or ".ndlora_factors." in name:
                parameter += torch.randn(parameter.shape, generator=generator) / 20


def test_every_field_has_values():
    assert set(VALUES) == {field.name for field in fields(NdLoraConfig)}


@pytest.mark.examples(120)
@given(configurations())
@example({"rank_pattern": {"query|gate": 1, "query": 2}})
@example({"alpha_pattern": {"query|gate": 1, "query": 2}, "r": 2})
@example({"modes": {"query|gate": {"in_modes": [3, 4]}, "query": {"in_modes": [2, 6]}}})
@example({"trainable_token_indices": []})
@example({"trainable_token_indices": {"embed_tokens": [TOKENS]}})
@example({"trainable_token_indices": {"query": [0]}})
@example({"trainable_token_indices": {"query": [0]}, "target_parameters": ["experts.up"]})
@example({"target_modules": ["query"], "target_parameters": ["query.weight"]})
@example({"lora_alpha": 3e38, "crossed_modes": 1})
@example({"modules_to_save": [""]})
@example({"r": 10**30})
@example({"method": "einsum", "options": {"equation": "out r, r in -> out in"}, "target_modules": LAYERS})
@example({"method": "crossed", "options": {"in_modes": [3, 4]}, "modes": {"query": {"in_modes": [2, 6]}}})
def test_our_own_error_or_an_adapter_that_comes_back(options):
    try:
        config = NdLoraConfig(**options)
    except NdLoraError:
        event("refused by the configuration")
        return
    with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config.save_pretrained(directory)
        assert values(PeftConfig.from_pretrained(directory)) == values(config)
        assert values(NdLoraConfig(**json.loads(json.dumps(values(config))))) == values(config)

        base = make_model()
        expected, before = base(INDICES), contents(base)
        try:
            model = get_peft_model(base, config).eval()
        except NdLoraError:
            event("refused when the model is seen")
            assert same(contents(base), before)
            return
        except (ValueError, TypeError) as error:
            assert re.search(PEFT_SAYS, str(error))
            event(f"refused by PEFT: {str(error)[:40]}")
            assert same(contents(base), before)
            return
        event("adapted")
        if promises_the_base(config, options):
            assert torch.equal(model(INDICES), expected)
        shake(model)
        trained = model(INDICES)
        model.save_pretrained(directory)
        torch.manual_seed(2)
        loaded = PeftModel.from_pretrained(make_model(), directory)
        assert values(loaded.peft_config["default"]) == values(config)
        saved = model.state_dict()
        assert saved.keys() == loaded.state_dict().keys()
        assert all(torch.equal(value, saved[name]) for name, value in loaded.state_dict().items())
        # what trains takes another order of sums than what does not
        torch.testing.assert_close(loaded(INDICES), trained, rtol=1e-4, atol=1e-4, equal_nan=True)
