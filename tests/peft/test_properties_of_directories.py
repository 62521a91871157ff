"""Adapter directories changed at random: loaded, checked and exported.

Only our own errors come out of the check and the exports, or one that names a missing file of the base model. PEFT,
which reads the files before us when it loads, may raise its own. What is written gives the logits of the loaded
adapter, a failure leaves nothing, and no input changes.
"""

import copy
import hashlib
import json
import shutil
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraError
from ndlora_plugins.integrations.peft.adapters.check import check_adapter
from ndlora_plugins.integrations.peft.exports.export import export_adapter

pytestmark = pytest.mark.filterwarnings("ignore")
ADAPTERS = {
    "ndlinear": {"method": "ndlinear"},
    "ndlinear-anchored": {"init_lora_weights": "ndlinear", "num_modes": 3},
    "crossed": {"crossed_modes": 2, "r": 2},
    "slora": {"method": "slora", "r": 2, "modules_to_save": ["lm_head"], "trainable_token_indices": [3, 1]},
    "slora-embedding": {"method": "slora", "r": 2, "target_modules": ["q_proj", "embed_tokens"]},
    "slora-parameter": {"method": "slora", "r": 2, "target_parameters": ["q_proj.weight"]},
    "nlora": {"method": "nlora", "r": 2},
    "inttune": {"method": "inttune", "r": 2},
}
CONFIG, TENSORS, INDEX = "adapter_config.json", "adapter_model.safetensors", "model.safetensors.index.json"
X = torch.arange(20).view(2, 10)
# what PEFT, transformers and torch raise where they read the files before us: broken JSON, an unknown type, no target,
# tensors of another shape
PEFTS = (ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError)
# a file of the base model that is not there is told as the operating system tells it
REFUSED = (NdLoraError, FileNotFoundError)
HUGE = 10**18 + 9
SCALARS = (
    st.none()
    | st.booleans()
    | st.sampled_from([-1, 0, 1, 2, 3, 2000, 2**31, HUGE, 10**30, 0.5, 1e200, float("nan"), float("inf")])
    | st.sampled_from(
        ["", "x", "(", "q_proj", "all-linear", "../x", "/", "none", "all", "slora", "n_lora", "\0", "ü"]
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["", "q_proj", "lm_head", "in_modes", "shape", "values", "("]), inner, max_size=3
        )
    ),
    max_leaves=5,
)
# values that the configuration takes, and that may not fit the file
FITTING = [
    ("r", 1),
    ("r", 3),
    ("lora_alpha", 3.0),
    ("use_rslora", True),
    ("anchor", "none"),
    ("anchor", "snapshot"),
    ("num_modes", 3),
    ("num_modes", 64),
    ("crossed_modes", 2),
    ("crossed_modes", HUGE),
    ("modes", {"in_modes": [4, 4]}),
    ("modes", {"q_proj": {"in_modes": [2, 8], "out_modes": [8, 2]}}),
    ("init_lora_weights", False),
    ("init_lora_weights", "n_lora"),
    ("method", "slora"),
    ("method", "ndlinear"),
    ("method", "nlora"),
    ("rank_pattern", {"q_proj": 3}),
    ("alpha_pattern", {"q_proj": 5}),
    ("target_modules", ["q_proj"]),
    ("target_modules", "all-linear"),
    ("target_modules", ".*proj"),
    ("target_modules", ["lm_head"]),
    ("target_parameters", ["k_proj.weight"]),
    ("exclude_modules", ["q_proj"]),
    ("layers_to_transform", [1]),
    ("modules_to_save", None),
    ("modules_to_save", ["norm"]),
    ("modules_to_save", ["score"]),
    ("trainable_token_indices", None),
    ("trainable_token_indices", [1, 3]),
    ("trainable_token_indices", [3, 40]),
    ("trainable_token_indices", [3, -1]),
    ("trainable_token_indices", {"embed_tokens": [3, 1]}),
    ("trainable_token_indices", {"lm_head": [3, 1]}),
    ("bias", "all"),
    ("bias", "ndlora_only"),
    ("ensure_weight_tying", True),
    ("lora_dropout", 0.5),
    ("inference_mode", False),
    ("task_type", None),
    ("task_type", "SEQ_CLS"),
    ("peft_type", "LORA"),
    ("base_fingerprint", None),
    ("base_fingerprint", {}),
    (
        "base_fingerprint",
        {"model.layers.0.self_attn.q_proj": {"shape": [16, 16], "storage": "", "values": None}},
    ),
    ("weight_forms", None),
    ("weight_forms", {}),
    (
        "weight_forms",
        {"model.embed_tokens": {"name": "lm_head", "kind": "embedding", "shape": [32, 16]}},
    ),
    (
        "weight_forms",
        {"model.layers.0.self_attn.q_proj": {"name": "lm_head", "kind": "parameter", "shape": [16, 16]}},
    ),
]
NAMES = st.sampled_from(
    [
        "odd",
        "lm_head.weight",
        "base_model.model.lm_head.weight",
        "base_model.model.model.norm.weight",
        "base_model.model.model.config.ndlora_factors.up",
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.ndlora_factors.mode_1",
        "base_model.model.model.layers.0.mlp.gate_proj.ndlora_factors.up",
        "model.layers.0.self_attn.q_proj.ndlora_factors.up",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        "base_model.model.ndlora_factors.up",
        ".ndlora_frozen.",
    ]
)
DTYPES = st.sampled_from(
    [
        torch.int8,
        torch.bool,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.float8_e4m3fn,
        torch.complex64,
    ]
)
SHAPES = st.sampled_from([(), (0,), (1,), (3, 4), (1, 4, 4), (2, 16), (16, 16), (1, 1, 1, 1)])
SHARDS = st.sampled_from(
    [
        "../other/outside.safetensors",
        "{outside}",
        "linked/outside.safetensors",
        "config.json",
        "none.safetensors",
        "",
        "\0.safetensors",
        "copy.safetensors",
        5,
        None,
        [],
    ]
)


def set_path(tree, path, value):
    """Set a value deep in `tree`: each number of `path` picks a key or an index, as far down as there are some."""
    keys = sorted(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key = keys[path[0] % len(keys)]
    if path[1:] and isinstance(tree[key], (dict, list)) and tree[key]:
        set_path(tree[key], path[1:], value)
    else:
        tree[key] = value


class Change:
    """The ways to change a directory; each takes the folder that holds `adapter`, `base` and `other`."""

    @staticmethod
    def value(folder, path, value):
        fields = json.loads((folder / "adapter" / CONFIG).read_text())
        set_path(fields, path, value)
        (folder / "adapter" / CONFIG).write_text(json.dumps(fields))

    @staticmethod
    def field(folder, name, value):
        fields = json.loads((folder / "adapter" / CONFIG).read_text())
        (folder / "adapter" / CONFIG).write_text(json.dumps({**fields, name: value}))

    @staticmethod
    def no_field(folder, number):
        fields = json.loads((folder / "adapter" / CONFIG).read_text())
        fields.pop(sorted(fields)[number % len(fields)])
        (folder / "adapter" / CONFIG).write_text(json.dumps(fields))

    @staticmethod
    def tensor(folder, number, shape, dtype, fill, name, keep):
        tensors = load_file(folder / "adapter" / TENSORS)
        key = sorted(tensors)[number % len(tensors)]
        old = tensors[key] if keep else tensors.pop(key)
        new = old if shape is None else torch.ones(shape)
        if fill is not None and new.numel():
            new = new.clone()
            new.view(-1)[0] = fill
        new = new if dtype is None else new.to(dtype)
        if not (name is None and keep is None):
            tensors[name or key] = new.clone().contiguous()
        save_file(tensors, folder / "adapter" / TENSORS)

    @staticmethod
    def cut(folder, name, share, bytes):
        whole = (folder / "adapter" / name).read_bytes()
        at = int(share * len(whole))
        (folder / "adapter" / name).write_bytes(whole[:at] + bytes)

    @staticmethod
    def byte(folder, name, share, byte):
        whole = bytearray((folder / "adapter" / name).read_bytes())
        whole[int(share * (len(whole) - 1))] = byte
        (folder / "adapter" / name).write_bytes(whole)

    @staticmethod
    def extra(folder, name):
        (folder / "adapter" / name).write_bytes(b"something else")

    @staticmethod
    def shard(folder, number, name):
        base = folder / "base"
        (base / "linked").symlink_to(folder / "other")
        shutil.copy(base / "model.safetensors", base / "copy.safetensors")
        names = sorted(load_file(base / "model.safetensors"))
        shards = dict.fromkeys(names, "model.safetensors")
        outside = str(folder / "other" / "outside.safetensors")
        shards[names[number % len(names)]] = name.format(outside=outside) if isinstance(name, str) else name
        (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))


NUMBER = st.integers(0, 30)
SHARE = st.floats(0, 1, exclude_max=True)
FILES = st.sampled_from([CONFIG, TENSORS])
CHANGES = st.one_of(
    st.tuples(st.just(Change.value), st.lists(NUMBER, min_size=1, max_size=4), VALUES),
    st.tuples(
        st.just(Change.field),
        st.sampled_from(sorted(NdLoraConfig().to_dict()) + ["use_dora", "new_option", "runtime_config"]),
        VALUES,
    ),
    st.sampled_from([(Change.field, *each) for each in FITTING]),
    st.sampled_from([(Change.field, *each) for each in FITTING]),
    st.tuples(st.just(Change.no_field), NUMBER),
    st.tuples(
        st.just(Change.tensor),
        NUMBER,
        st.none() | SHAPES,
        st.none() | DTYPES,
        st.sampled_from([None, None, float("nan"), float("inf"), 0.25, 1e30]),
        st.none() | NAMES,
        st.sampled_from([True, False, None]),
    ),
    st.tuples(st.just(Change.cut), FILES, SHARE, st.binary(max_size=4)),
    st.tuples(st.just(Change.byte), FILES, SHARE, st.integers(0, 255)),
    st.tuples(st.just(Change.extra), st.sampled_from(["adapter_model.bin", "adapter_model.pt", "README.md"])),
    st.tuples(st.just(Change.shard), NUMBER, SHARDS),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a base model, an adapter of each kind, and something that is neither."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=32,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    for name, options in ADAPTERS.items():
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        model = get_peft_model(model, NdLoraConfig(task_type="CAUSAL_LM", **options))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn(parameter.shape), alpha=0.1)
        model.save_pretrained(folder / name)
    (folder / "other").mkdir()
    shutil.copy(folder / "base" / "model.safetensors", folder / "other" / "outside.safetensors")
    return folder


@pytest.fixture(scope="module")
def base_model(saved):
    return AutoModelForCausalLM.from_pretrained(saved / "base").eval()


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def loaded_logits(base_model, adapter):
    """Of the adapter as PEFT loads it; None if it does not, or not without a warning that tensors are missing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            logits = PeftModel.from_pretrained(copy.deepcopy(base_model), adapter).eval()(X).logits.detach()
        except (NdLoraError, *PEFTS):
            return None
    missing = any("Found missing adapter keys" in str(entry.message) for entry in caught)
    return None if missing else logits


def exported_logits(base_model, directory, to):
    if to == "merged":
        return AutoModelForCausalLM.from_pretrained(directory).eval()(X).logits
    return PeftModel.from_pretrained(copy.deepcopy(base_model), directory).eval()(X).logits


@pytest.mark.examples(80)
@given(
    adapter=st.sampled_from(sorted(ADAPTERS)),
    changes=st.lists(CHANGES, min_size=1, max_size=2),
    to=st.sampled_from(["lora", "lokr", "merged"]),
    with_base=st.booleans(),
)
def test_changed_directories(adapter, changes, to, with_base, saved, base_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("changed")
    shutil.copytree(saved / adapter, folder / "adapter")
    shutil.copytree(saved / "base", folder / "base")
    shutil.copytree(saved / "other", folder / "other")
    for change, *arguments in changes:
        try:
            change(folder, *arguments)
        except (
            ValueError,
            KeyError,
            AttributeError,
            TypeError,
            IndexError,
            RuntimeError,
            OSError,
            SafetensorError,
        ):
            pass  # the second change does not fit what the first one has left
    before, base = hashes(folder), str(folder / "base")
    try:
        problems = check_adapter(folder / "adapter", base if with_base else None).problems
    except REFUSED as error:
        problems = (str(error),)
    expected = loaded_logits(base_model, folder / "adapter")
    try:
        export_adapter(
            folder / "adapter", folder / "out", to, base=base, max_error=0 if to == "lora" else None
        )
    except REFUSED:
        assert not list(folder.glob("*out*"))
    else:
        assert [problem for problem in problems if "No layer does anything" not in problem] == []
        if expected is not None:
            found = exported_logits(base_model, folder / "out", to)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        shutil.rmtree(folder / "out")
    assert hashes(folder) == before
    shutil.rmtree(folder)
