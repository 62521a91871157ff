"""Bad input: each a clear error that names what was given and what to do, before anything is changed."""

import json
import warnings
from dataclasses import fields
from functools import partial
from types import MappingProxyType

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ndlora_plugins import NdLoraConfig, hookimpl
from ndlora_plugins.errors import (
    BaseModelWarning,
    LopsidedModesWarning,
    NdLoraError,
    NdLoraTypeError,
    NdLoraValueError,
    UnmatchedTargetWarning,
)
from ndlora_plugins.registry import register_plugin, unregister_plugin
from ndlora_plugins.starts import Start

# options, what the error must say: refused by the configuration alone
OPTIONS = [
    ({"method": "nope"}, r"method='nope' is no known method. Known: 'crossed'.*entry-point group 'ndlora'"),
    ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' is no known start"),
    (
        {"method": "inttune", "init_lora_weights": "s_lora"},
        r"'s_lora' cannot start method='inttune'.*nothing would ever get a gradient",
    ),
    ({"method": "ndlinear", "init_lora_weights": "n_lora"}, r"cannot start method='ndlinear'.*'lora_step'"),
    ({"r": 0}, r"r=0: a rank must be an integer of at least 1"),
    ({"r": 2.5}, r"r=2.5: a rank must be an integer"),
    ({"rank_pattern": {"q_proj": 0}}, r"q_proj=0: a rank must be"),
    ({"lora_dropout": 1.0}, r"lora_dropout=1.0"),
    ({"anchor": "residual"}, r"anchor='residual': choose one of \['snapshot', 'none'\]"),
    ({"num_modes": 1}, r"num_modes=1: choose an integer of at least 2"),
    ({"crossed_modes": 0}, r"crossed_modes=0: choose an integer of at least 1"),
    ({"modes": {"q_proj": [4, 6]}}, r"modes=.*give \{'in_modes'"),
    ({"bias": "boft_only"}, r"bias='boft_only': choose 'none', 'all' or 'ndlora_only'"),
    ({"target_modules": ".*q", "layers_to_transform": [0]}, r"`layers_to_transform` cannot be used"),
    ({"schema_version": 3}, r"schema_version=3.*Upgrade"),
    ({"use_dora": True}, r"use_dora=True is an option of LoraConfig"),
    ({"loftq_config": {"loftq_bits": 4}}, r"loftq_config=.*use init_lora_weights='n_lora'"),
    ({"layer_replication": [(0, 2)]}, r"layer_replication="),
    (
        {"target_modules": ["q_proj"], "layers_pattern": ["("], "layers_to_transform": [0]},
        r"layers_pattern=\['\('\]",
    ),
    ({"task_type": "NOPE"}, r"Invalid task type: 'NOPE'"),
]
NAN, INFINITY = float("nan"), float("inf")
# field -> values that it cannot have: refused by the configuration alone, by a message that begins with the field
REFUSED_VALUES = {
    "method": [5, True, ["slora"]],
    "r": ["8", 2.0, True, -1, [8], {}, NAN, 10**400],
    "lora_alpha": ["16", True, [16], NAN, INFINITY, -INFINITY, 10**400, 1e10],
    "lora_dropout": ["0.1", None, True, [0.1], NAN, -0.1],
    "init_lora_weights": [1, 0.5, ["s_lora"]],
    "anchor": [False, 5, ["none"]],
    "num_modes": ["2", 2.0, True, [2], 2000, 10**30],
    "crossed_modes": ["4", True, 4.0, [4], -4],
    "modes": [
        [4, 6],
        "6x8",
        5,
        {"in_modes": 6},
        {"in_modes": "68"},
        {"in_modes": [6, "8"]},
        {"in_modes": [6, True]},
        {"in_modes": [0, 8]},
        {"in_modes": [6.0, 8]},
        {"q_proj": {"in_modes": [6, 8], "modes": []}},
        {"(": {"in_modes": [6, 8]}},
        {"in_modes": [6, 8], "q_proj": {"in_modes": [6, 8]}},
    ],
    "random_seed": [[1], "1", 1.0, True, {}],
    "target_modules": [
        "(",
        "a{99999999999}",
        "(" * 2000,
        5,
        True,
        [5],
        [["q_proj"]],
        {"q_proj": 1},
        b"q_proj",
    ],
    "exclude_modules": ["*", 5, True, [5], {"q_proj": 1}],
    "layers_to_transform": ["0", True, 0.5, ["0"], [True], {"0": 1}],
    "layers_pattern": ["(", 5, [5], {}],
    "rank_pattern": [None, [("q_proj", 2)], "q_proj", {"q_proj": "2"}, {"q_proj": True}, {"(": 2}, {True: 2}],
    "alpha_pattern": [None, ["q_proj"], 2, {"q_proj": NAN}, {"q_proj": "2"}, {"q_proj": True}, {"[": 2}],
    "modules_to_save": ["lm_head", 5, [5], {"lm_head": 1}, ["("]],
    "bias": [None, True, 5, ["all"]],
    "fan_in_fan_out": ["false", 1, []],
    "use_rslora": ["false", 1, 0, []],
    "trainable_token_indices": [
        "1",
        5,
        True,
        ["1"],
        [True],
        [0.5],
        {"embed_tokens": 1},
        {"embed_tokens": ["1"]},
    ],
    "target_parameters": ["experts.down_proj", 5, [5]],
    "ensure_weight_tying": ["false", 1],
    "base_fingerprint": [[], "q_proj", 5],
    "weight_forms": [[], "q_proj", 5],
    "options": [[4], "size", 5, True],
    "layers": [[1], "q_proj", True],
    "checksums": [[1], "q_proj", True],
    "save_frozen": ["false", 1],
    "schedules": [5, True, [5], {"nested_rank": 5}, "nobody", {"nested_rank": {"nothing": 1}}],
    "gradient_batches": ["8", True, 0, -1, 2.5],
    "schema_version": [0, -1, "1", 1.0, True, None],
    "task_type": [5, ["CAUSAL_LM"]],
    "peft_type": [5],
    "auto_mapping": [5, []],
    "peft_version": [5],
    "base_model_name_or_path": [5, ["base"]],
    "revision": [5],
    "inference_mode": ["false", 1],
}
# options, the same in Python's own types: what YAML, OmegaConf and numpy give
ACCEPTED_VALUES = [
    ({"lora_alpha": 16}, {"lora_alpha": 16}),
    ({"lora_alpha": np.float32(0.5), "r": np.int64(2)}, {"lora_alpha": 0.5, "r": 2}),
    ({"lora_dropout": 0}, {"lora_dropout": 0}),
    ({"use_rslora": None, "init_lora_weights": None}, {"use_rslora": None, "init_lora_weights": None}),
    ({"use_rslora": np.True_}, {"use_rslora": True}),
    ({"target_modules": ("q_proj", "v_proj")}, {"target_modules": {"q_proj", "v_proj"}}),
    ({"exclude_modules": {"q_proj": 1}.keys()}, {"exclude_modules": {"q_proj"}}),
    ({"modules_to_save": ("lm_head",)}, {"modules_to_save": ["lm_head"]}),
    ({"layers_to_transform": range(2)}, {"layers_to_transform": [0, 1]}),
    ({"layers_to_transform": np.arange(2)}, {"layers_to_transform": [0, 1]}),
    ({"rank_pattern": MappingProxyType({0: 2})}, {"rank_pattern": {"0": 2}}),
    ({"modes": {"in_modes": (6, 8), "out_modes": None}}, {"modes": {"in_modes": [6, 8], "out_modes": None}}),
    ({"trainable_token_indices": (1, 2)}, {"trainable_token_indices": [1, 2]}),
]
# options, what the error must say: refused when the model is seen
MODELS = [
    ({"target_modules": ["nothing"]}, ValueError, r"nothing.*not found in the base model"),
    (
        {"target_modules": ["norm"]},
        NdLoraTypeError,
        r"'crossed' cannot adapt layer 'model.norm' of type LlamaRMSNorm",
    ),
    (
        {"modes": {"in_modes": [5, 5]}},
        NdLoraValueError,
        r"Layer 'model.layers.0.self_attn.q_proj', 48 x 48 .*in_modes=\[5, 5\] multiply to 25",
    ),
    ({"modes": {"in_modes": [6, 8], "out_modes": [2, 4, 6]}}, NdLoraValueError, r"must be equally many"),
    (
        {"method": "nlora", "r": 32},
        NdLoraValueError,
        r"at most r=24 on layer 'model.layers.0.self_attn.k_proj'.*r=32",
    ),
    ({"target_parameters": ["experts.down_proj"]}, ValueError, r"no `target_parameters` found"),
    (
        {"method": "slora", "target_parameters": ["model.norm.weight"]},
        NdLoraTypeError,
        r"'slora' cannot adapt the parameter 'model.norm.weight' of shape \[48\]",
    ),
    (
        {"lora_dropout": 0.1, "target_parameters": ["q_proj.weight"]},
        NdLoraValueError,
        r"lora_dropout=0.1 cannot be used on the parameter 'model.layers.0.self_attn.q_proj.weight'",
    ),
    (
        {"r": 10**9, "method": "slora"},
        NdLoraValueError,
        r"r=1000000000 makes an adapter of [\d,]+ numbers on layer 'model.layers.0.self_attn.q_proj', [\d,]+ times its "
        r"weight of 48 x 48.*Lower r",
    ),
    (
        {"rank_pattern": {"1.mlp.down_proj": 10**30}},
        NdLoraValueError,
        r"r=10{30} makes .* numbers on layer 'model.layers.1.mlp.down_proj'",
    ),
    (
        {"trainable_token_indices": [0, 128]},
        NdLoraValueError,
        r"trainable_token_indices=\[0, 128\] for layer 'model.embed_tokens': it has 128 rows",
    ),
    (
        {"trainable_token_indices": {"q_proj": [0]}},
        NdLoraValueError,
        r"layer 'model.layers.0.self_attn.q_proj': it gets an adapter too",
    ),
    (
        {"trainable_token_indices": {"model.norm": [0]}},
        NdLoraValueError,
        r"layer 'model.norm': it is a LlamaRMSNorm, which has no rows",
    ),
    (
        {"target_modules": ["q_proj"], "target_parameters": ["q_proj.weight"]},
        ValueError,
        r"layer 'model.layers.0.self_attn.q_proj' .*not a valid target",
    ),
]


@pytest.mark.parametrize("options, message", OPTIONS)
def test_options(options, message):
    with pytest.raises(NdLoraValueError, match=message):
        NdLoraConfig(**options)


@pytest.mark.parametrize("options, error, message", MODELS)
def test_models(options, error, message, make_llama):
    model = make_llama()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=message):
        get_peft_model(model, NdLoraConfig(**options))
    assert [name for name, _ in model.named_modules()] == names


class OutOfMemory:
    """A plugin: a start that asks for more memory than there is, on layers that read 96 features."""

    @staticmethod
    @hookimpl
    def ndlora_starts():
        def start(structure, trains, seen, generator):
            if structure.layout.in_features == 96:
                torch.empty(2**50)
            return {factor.name: torch.zeros(factor.shape) for factor in structure.factors}

        return [Start(name="too_large", summary="for this test", source="none", function=start, moves=True)]


@pytest.mark.parametrize("adapters", [[], ["first"]])
def test_no_memory_left_halfway_leaves_the_model_as_it_was(adapters, make_llama):
    register_plugin(OutOfMemory)
    try:
        model = make_llama()
        for name in adapters:
            model = get_peft_model(model, NdLoraConfig(), name)
        before = [(name, id(module)) for name, module in model.named_modules()]
        trains = [(name, id(value), value.requires_grad) for name, value in model.named_parameters()]
        add = model.add_adapter if adapters else partial(PeftModel, model)
        config = NdLoraConfig(init_lora_weights="too_large")
        with pytest.raises(RuntimeError, match="allocate memory"):
            add(**{"adapter_name": "second", "peft_config": config})
        assert [(name, id(module)) for name, module in model.named_modules()] == before
        assert [(name, id(value), value.requires_grad) for name, value in model.named_parameters()] == trains
        assert getattr(model, "peft_config", {}).keys() == set(adapters)
    finally:
        unregister_plugin(OutOfMemory)


def test_a_weight_split_over_processes_is_refused(make_llama):
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        model = make_llama()
        projection = model.model.layers[0].self_attn.k_proj
        mesh = init_device_mesh("cpu", (1,))
        projection.weight = nn.Parameter(distribute_tensor(projection.weight.detach(), mesh, [Shard(0)]))
        before = list(model.named_modules())
        with pytest.raises(NdLoraTypeError, match=r"'model.layers.0.self_attn.k_proj': its weight is split"):
            get_peft_model(model, NdLoraConfig())
        assert list(model.named_modules()) == before
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    "field, value", [(field, value) for field, values in REFUSED_VALUES.items() for value in values]
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(field, value):
    with pytest.raises(NdLoraValueError, match=rf"^{field}=(?s:.){{1,250}}: \w(?s:.)*\.$"):
        NdLoraConfig(**{field: value})


def test_every_field_has_values_that_are_refused():
    assert set(REFUSED_VALUES) == {f.name for f in fields(NdLoraConfig)}


@pytest.mark.parametrize("options, expected", ACCEPTED_VALUES)
def test_what_yaml_and_numpy_give_is_accepted_and_saved(options, expected, tmp_path):
    config = NdLoraConfig(**options)
    config.save_pretrained(tmp_path)
    assert {name: getattr(config, name) for name in options} == expected
    assert {name: getattr(PeftConfig.from_pretrained(tmp_path), name) for name in options} == expected


def test_a_wrong_value_in_a_file_is_refused(adapters):
    directory = adapters()
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_rslora": "false"}))
    with pytest.raises(NdLoraValueError, match=r"^use_rslora='false': choose True or False"):
        PeftConfig.from_pretrained(directory)


def test_values_that_mean_nothing_are_accepted():
    NdLoraConfig(use_dora=False, loftq_config=None, megatron_config={})


def test_every_option_of_lora_config_is_ours_or_refused_with_a_reason():
    from ndlora_plugins.integrations.peft.configuration.lora_keywords import _REFUSED

    ours = {f.name for f in fields(NdLoraConfig)}
    unknown = {f.name for f in fields(LoraConfig)} - ours - set(_REFUSED)
    assert unknown <= {"runtime_config"}  # not saved, not a keyword that anybody passes on


def test_every_error_is_of_our_class():
    with pytest.raises(NdLoraError):
        NdLoraConfig(r=0)


@pytest.fixture
def adapters(make_llama, tmp_path):
    """A function that saves an adapter made on the base with seed 0 and returns its directory."""

    def make(**options):
        directory = tmp_path / "adapter"
        get_peft_model(make_llama(), NdLoraConfig(**options)).save_pretrained(directory)
        return directory

    return make


def truncate(directory):
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(directory):
    path = directory / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:20])


def no_bytes(directory):
    (directory / "adapter_model.safetensors").write_bytes(b"")


def no_tensors(directory):
    save_file({}, directory / "adapter_model.safetensors")


def empty_tensors(directory):
    save_file(
        {"base_model.model.q_proj.ndlora_factors.mode_1": torch.zeros(0, 4)},
        directory / "adapter_model.safetensors",
    )


def other_tensors(directory):
    save_file(
        {"base_model.model.q_proj.lora_A.weight": torch.zeros(2, 4)}, directory / "adapter_model.safetensors"
    )


def newer_schema(directory):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99, "new_option": 1}))


# what is done to the directory, what the error must say
BROKEN = [
    (truncate, r"adapter_model.safetensors \(\d+ bytes\) is truncated"),
    (cut_header, r"is truncated or no safetensors file"),
    (no_bytes, r"\(0 bytes\) is truncated"),
    (no_tensors, r"holds 0 tensors but none of an NDLORA adapter"),
    (empty_tensors, r"1 of 1 tensors are empty.*mode_1"),
    (other_tensors, r"holds 1 tensors but none of an NDLORA adapter"),
    (newer_schema, r"schema_version=99; the installed ndlora-plugins reads up to 2"),
]


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize("damage, message", BROKEN)
def test_broken_directories_change_nothing(damage, message, adapters, make_llama):
    directory = adapters()
    damage(directory)
    model = make_llama()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(NdLoraValueError, match=message):
        PeftModel.from_pretrained(model, directory)
    assert [name for name, _ in model.named_modules()] == names


def test_an_unknown_key_of_the_same_schema_warns(adapters):
    directory = adapters()
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "new_option": 1}))
    with pytest.warns(UserWarning, match="new_option"):
        PeftConfig.from_pretrained(directory)


# method -> error or warning on a base of the same shape with other weights
OTHER_WEIGHTS = [("nlora", NdLoraValueError), ("inttune", NdLoraValueError)]


@pytest.mark.parametrize("method, error", OTHER_WEIGHTS)
def test_another_base_is_an_error_where_the_start_is_read_from_it(method, error, adapters, make_llama):
    directory, model = adapters(method=method), make_llama(seed=1)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(error, match=r"layer 'model.layers.0.mlp.down_proj' differ.*recomputed"):
        PeftModel.from_pretrained(model, directory)
    assert [name for name, _ in model.named_modules()] == names


NAN = float("nan")
# an entry of the fingerprint that compares with nothing
NO_FINGERPRINTS = [
    {"shape": [48, 48], "storage": "float32", "values": [NAN] * 8},
    {"shape": [48, 48], "storage": "float32", "values": [float("inf")] * 8},
    {"shape": [48, 48], "storage": "float32", "values": [1e200] * 8},
    {"shape": [48, 48], "storage": "float32", "values": []},
    {"shape": [48, 48], "storage": "float32", "values": ["1"] * 8},
    {"shape": [48, 48], "storage": "float32"},
    {"shape": [48, 48], "storage": None, "values": None},
    {"shape": [48], "storage": "float32", "values": None},
    {"shape": [48, NAN], "storage": "float32", "values": None},
    [],
]


@pytest.mark.parametrize("method", ["slora", "inttune"])
@pytest.mark.parametrize("entry", NO_FINGERPRINTS)
def test_a_fingerprint_that_compares_with_nothing_is_an_error(entry, method, adapters, make_llama):
    directory, model = adapters(method=method), make_llama(seed=1)
    path = directory / "adapter_config.json"
    fields = json.loads(path.read_text())
    fields["base_fingerprint"]["model.layers.0.self_attn.q_proj"] = entry
    path.write_text(json.dumps(fields))
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(NdLoraValueError, match="base_fingerprint of the adapter's configuration"):
        PeftModel.from_pretrained(model, directory)
    assert [name for name, _ in model.named_modules()] == names


def test_a_base_with_nan_is_not_the_one_of_the_fingerprint(adapters, make_llama):
    directory, model = adapters(method="inttune"), make_llama()
    model.model.layers[0].mlp.down_proj.weight.data.fill_(NAN)
    with pytest.raises(NdLoraValueError, match="differ from those"):
        PeftModel.from_pretrained(model, directory)


@pytest.mark.parametrize("method", ["ndlinear", "slora"])
def test_another_base_is_a_warning_elsewhere(method, adapters, make_llama):
    with pytest.warns(BaseModelWarning, match="differ from those that the adapter was trained on"):
        PeftModel.from_pretrained(make_llama(seed=1), adapters(method=method))


@pytest.mark.parametrize("method", ["ndlinear", "slora", "nlora", "inttune"])
@pytest.mark.parametrize("changes, message", [
    ({"hidden_size": 64}, r"is 64 x 96 .out x in. in this base model; the adapter was trained on 48 x 96"),
    ({"num_hidden_layers": 1}, r"an adapted layer 'model.layers.1.mlp.down_proj'; this model has none"),
])  # fmt: skip
def test_a_base_of_another_shape_is_an_error(method, changes, message, adapters, make_llama):
    model = make_llama(**changes)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(NdLoraValueError, match=message):
        PeftModel.from_pretrained(model, adapters(method=method))
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_another_precision_is_neither(dtype, adapters, make_llama):
    directory = adapters(method="inttune")
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseModelWarning)
        PeftModel.from_pretrained(make_llama(dtype=dtype), directory)


# options, warning, what it must say
WARNINGS = [
    (
        {"target_modules": ["q_proj", "nope"]},
        UnmatchedTargetWarning,
        r"target_modules: the entry 'nope' matches no",
    ),
    ({"rank_pattern": {"nope": 2}}, UnmatchedTargetWarning, r"rank_pattern: the entry 'nope' matches no"),
    (
        {"alpha_pattern": {"^q_proj": 2}},
        UnmatchedTargetWarning,
        r"alpha_pattern: the entry '\^q_proj' matches no",
    ),
    (
        {"modes": {"nope": {"in_modes": [6, 8]}}},
        UnmatchedTargetWarning,
        r"modes: the entry 'nope' matches no",
    ),
]


@pytest.mark.parametrize("options, category, message", WARNINGS)
def test_entries_that_do_nothing_are_named(options, category, message, make_llama):
    with pytest.warns(category, match=message):
        get_peft_model(make_llama(), NdLoraConfig(**options))


# entries that leave layers out, with the default targets
LEAVING_OUT = [
    {"exclude_modules": ["q_proj"]},
    {"exclude_modules": r".*layers\.0\..*"},
    {"layers_to_transform": [1]},
    {"modules_to_save": ["down_proj"]},
]


@pytest.mark.parametrize("options", LEAVING_OUT)
def test_layers_that_are_left_out_are_not_told_of(options, make_llama, no_warnings):
    get_peft_model(make_llama(), NdLoraConfig(**options))


def test_a_lopsided_layer_is_named_with_its_cost():
    model = nn.Sequential(nn.Linear(64, 257), nn.Linear(257, 64))
    with pytest.warns(
        LopsidedModesWarning,
        match=r"Layer '[01]' .and 1 more layers.*\[1, 257\].*\d parameters, \d+\.\d times",
    ):
        get_peft_model(model, NdLoraConfig(method="ndlinear", target_modules=["0", "1"]))
