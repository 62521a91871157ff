"""Bad input: each a clear error that names what was given and what to do, before anything is changed."""

import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import (
    BaseModelWarning,
    LopsidedModesWarning,
    NdLoraError,
    NdLoraTypeError,
    NdLoraValueError,
    UnmatchedTargetWarning,
)

# options, what the error must say: refused by the configuration alone
OPTIONS = [
    ({"method": "nope"}, r"method='nope' is no known method. Known: 'ndlinear'.*entry-point group 'ndlora'"),
    ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' is no known initialiser"),
    (
        {"method": "inttune", "init_lora_weights": "s_lora"},
        r"'s_lora' cannot start method='inttune'.*never get a gradient",
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
    ({"schema_version": 2}, r"schema_version=2.*Upgrade"),
    ({"use_dora": True}, r"use_dora=True is an option of LoraConfig"),
    ({"loftq_config": {"loftq_bits": 4}}, r"loftq_config=.*use init_lora_weights='n_lora'"),
    ({"layer_replication": [(0, 2)]}, r"layer_replication="),
]
# options, what the error must say: refused when the model is seen
MODELS = [
    ({"target_modules": ["nothing"]}, ValueError, r"nothing.*not found in the base model"),
    (
        {"target_modules": ["norm"]},
        NdLoraTypeError,
        r"'ndlinear' cannot adapt layer 'model.norm' of type LlamaRMSNorm",
    ),
    (
        {"modes": {"in_modes": [5, 5]}},
        NdLoraValueError,
        r"in_modes=\[5, 5\] of layer 'model.layers.0.self_attn.q_proj' multiply to 25",
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


def test_values_that_mean_nothing_are_accepted():
    NdLoraConfig(use_dora=False, loftq_config=None, megatron_config={})


def test_every_option_of_lora_config_is_ours_or_refused_with_a_reason():
    from dataclasses import fields

    from ndlora_plugins.integrations.peft.config import _REFUSED

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
    (newer_schema, r"schema_version=99; the installed ndlora-plugins reads up to 1"),
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


def test_a_lopsided_layer_is_named_with_its_cost():
    model = nn.Sequential(nn.Linear(64, 257), nn.Linear(257, 64))
    with pytest.warns(
        LopsidedModesWarning,
        match=r"Layer '[01]' .and 1 more layers.*\[1, 257\].*\d parameters, \d+\.\d times",
    ):
        get_peft_model(model, NdLoraConfig(target_modules=["0", "1"]))
