"""`axolotl merge-lora`: its default, memory-efficient way reads LoRA's keys only and would merge nothing.

Ours takes its place for our adapter: one shard of the base model at a time is read, merged and written, so
that the whole model never stands in memory. What it cannot do goes the "legacy" way, on the loaded model.
"""

from __future__ import annotations

import functools
import json
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from axolotl.utils.logging import get_logger
from huggingface_hub import snapshot_download
from peft import PeftConfig
from peft.utils.save_and_load import load_peft_weights
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from ndlora_plugins.errors import NdLoraError, NdLoraValueError
from ndlora_plugins.integrations.peft.fingerprint import FingerprintedLayer, compare_fingerprint
from ndlora_plugins.integrations.peft.layer import NdLoraLinear, weight_out_in
from ndlora_plugins.integrations.peft.model import plan_model
from ndlora_plugins.integrations.peft.registration import NAME

__all__ = ["CannotMergeByShard", "enable", "merge_by_shard"]

LOG = get_logger("axolotl.plugins.ndlora")
_HOST = "axolotl.cli.merge_lora"
_INDEX = "model.safetensors.index.json"
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
_PREFIX = "base_model.model."  # PEFT's, of every key in an adapter file


class CannotMergeByShard(NdLoraError):
    """The message says why. The loaded model can be merged."""


def enable(cfg: Any) -> None:
    """Stand before `do_merge_lora`; where Axolotl has not loaded it yet, ask for "legacy", as right."""
    module = sys.modules.get(_HOST)
    if module is None:
        cfg["merge_method"] = "legacy"
        return
    original = module.do_merge_lora
    if getattr(original, "merges_ndlora", False):
        return

    @functools.wraps(original)
    def do_merge_lora(*, cfg: Any) -> None:
        if cfg.adapter == "ndlora" and cfg.merge_method != "legacy":
            try:
                return _merge(cfg)
            except CannotMergeByShard as reason:
                LOG.warning("%s Merging on the loaded model instead (merge_method: legacy).", reason)
                cfg.merge_method = "legacy"
        return original(cfg=cfg)

    do_merge_lora.merges_ndlora = True
    module.do_merge_lora = do_merge_lora


def _merge(cfg: Any) -> None:
    from axolotl.loaders import load_tokenizer

    output = Path(cfg.output_dir) / "merged"
    count = merge_by_shard(
        cfg.base_model,
        cfg.lora_model_dir,
        output,
        revision=cfg.revision_of_model,
        trust_remote_code=bool(cfg.trust_remote_code),
    )
    load_tokenizer(cfg).save_pretrained(str(output), save_jinja_files=cfg.tokenizer_save_jinja_files)
    LOG.info("ndlora: merged %s layers into %s", count, output)


def merge_by_shard(
    base: str, adapter: str, output: Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> int:
    """Write the base model with the adapter merged in, shard by shard; returns how many layers were merged.

    Args:
        base: directory or hub name of the base model, in safetensors files.
        adapter: directory or hub name of an NDLORA adapter.
        output: directory to write; weights of an earlier merge in it are replaced.

    Raises:
        CannotMergeByShard: before anything is written; the loaded model can be merged.
        NdLoraValueError: the adapter is of another kind, broken, or of another base model.
    """
    config = PeftConfig.from_pretrained(adapter)
    if config.peft_type != NAME:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise NdLoraValueError(
            f"{adapter} holds an adapter of type {kind}; adapter: ndlora merges {NAME} only."
        )
    loaded = load_peft_weights(adapter, device="cpu")
    state = {key.removeprefix(_PREFIX): value for key, value in loaded.items()}
    directory = Path(base) if Path(base).is_dir() else Path(snapshot_download(base, revision=revision))
    shards = _shards(directory)
    model = _skeleton(directory, config, trust_remote_code)
    plans = {_stored_name(name, model, shards): (name, plan) for name, plan in plan_model(model, config)}
    _check_factors(state, plans.values())
    whole = _stored_whole(state, shards, directory)
    for key, (name, plan) in plans.items():
        _check_base(config, name, plan, model, directory / shards[key], key)

    output.mkdir(parents=True, exist_ok=True)
    _clear_weights(output)
    for file in sorted(directory.iterdir()):
        if file.is_file() and file.suffix not in _WEIGHTS:
            shutil.copy2(file, output / file.name)
    for shard in sorted(set(shards.values())):
        tensors, metadata = _read_shard(directory / shard)
        for key in tensors.keys() & plans.keys():
            name, plan = plans[key]
            tensors[key] = _merged(model.get_submodule(name), name, plan, config, state, tensors[key])
        for key in tensors.keys() & whole:
            tensors[key] = state[key].to(tensors[key].dtype)
        _save_shard(tensors, metadata, output / shard)
    return len(plans)


def _shards(directory: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    index = directory / _INDEX
    if index.is_file():
        return json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    single = directory / "model.safetensors"
    if not single.is_file():
        raise CannotMergeByShard(f"{directory} has no safetensors file.")
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single.name)


def _skeleton(directory: Path, config: PeftConfig, trust_remote_code: bool) -> nn.Module:
    """The base model without its weights."""
    if config.task_type not in (None, "CAUSAL_LM"):
        raise CannotMergeByShard(f"The adapter is for task {config.task_type}, not CAUSAL_LM.")
    model_config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if getattr(model_config, "quantization_config", None):
        raise CannotMergeByShard(f"The base model in {directory} is stored quantised.")
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(model_config, trust_remote_code=trust_remote_code)
    except ValueError as error:  # no causal model of this kind: an image-text one, say
        raise CannotMergeByShard(f"{type(model_config).__name__} makes no causal language model.") from error


def _stored_name(name: str, model: nn.Module, shards: Mapping[str, str]) -> str:
    """The name under which the weight of layer `name` stands in the files."""
    key = f"{name}.weight"
    bare = key.removeprefix(f"{model.base_model_prefix}.")  # some checkpoints hold the model without its head
    for candidate in (key, bare):
        if candidate in shards:
            return candidate
    raise CannotMergeByShard(f"The weight of layer {name!r} is tied, or stored under another name.")


def _stored_whole(state: Mapping[str, Tensor], shards: Mapping[str, str], directory: Path) -> set[str]:
    """Names of the tensors that the adapter brings in full (`modules_to_save`)."""
    whole = {key for key in state if ".ndlora_" not in key}
    for key in whole:
        if key not in shards:
            raise CannotMergeByShard(
                f"The adapter's tensor {key!r} has no counterpart of that name in the files."
            )
        with safe_open(directory / shards[key], framework="pt") as file:
            if list(file.get_slice(key).get_shape()) != list(state[key].shape):
                raise CannotMergeByShard(f"The adapter's tensor {key!r} has another shape than the file's.")
    return whole


def _check_factors(state: Mapping[str, Tensor], plans: Iterable[tuple[str, Any]]) -> None:
    """Every planned factor is there in its shape, and no other."""
    expected = {}
    for name, plan in plans:
        expected.update({f"{name}.ndlora_factors.{factor.name}": factor.shape for factor in plan.trained})
        if not plan.recomputed:
            expected.update({f"{name}.ndlora_frozen.{factor.name}": factor.shape for factor in plan.frozen})
    found = {key: tuple(value.shape) for key, value in state.items() if ".ndlora_" in key}
    for key in sorted(expected.keys() | found.keys()):
        if found.get(key) != (tuple(expected[key]) if key in expected else None):
            raise NdLoraValueError(
                f"The adapter file has {key!r} with shape {found.get(key)}; its configuration needs "
                f"{expected.get(key)} (None: no such tensor). Save the adapter again."
            )


def _check_base(config: PeftConfig, name: str, plan: Any, model: nn.Module, file: Path, key: str) -> None:
    """Hold one layer against the adapter's fingerprint, if it is one of the few in there."""
    saved = (config.base_fingerprint or {}).get(name)
    if saved is None:
        return
    with safe_open(file, framework="pt") as opened:
        stored = opened.get_tensor(key)
    weight = weight_out_in(model.get_submodule(name), stored)
    layer = FingerprintedLayer(name, tuple(weight.shape), weight, str(stored.dtype).removeprefix("torch."))
    base_name = config.base_model_name_or_path
    compare_fingerprint({name: saved}, [layer], reads_weight=plan.recomputed, base_name=base_name)


def _merged(
    base: nn.Module, name: str, plan: Any, config: PeftConfig, state: Mapping[str, Tensor], weight: Tensor
) -> Tensor:
    """The weight of one layer with its update added. `base`, a layer without weights, is left as it was."""
    empty = base.weight
    base.weight = nn.Parameter(weight, requires_grad=False)
    try:
        alpha = config.options_for(name).alpha
        layer = NdLoraLinear(base, "default", plan, lora_alpha=alpha, lora_dropout=0.0, inference_mode=True)
        for group, factors in (("factors", layer.ndlora_factors), ("frozen", layer.ndlora_frozen)):
            for factor, parameter in _parameters(factors):
                saved = state[f"{name}.ndlora_{group}.{factor}"]
                parameter.data = saved.to(torch.promote_types(saved.dtype, torch.float32))
        layer.merge(safe_merge=True)
        return base.weight.data
    finally:
        base.weight = empty


def _parameters(factors: nn.ModuleDict) -> Iterator[tuple[str, nn.Parameter]]:
    """Of the adapter; factors that are recomputed from the base weight are buffers and not among them."""
    if "default" in factors:
        yield from factors["default"].named_parameters()


def _read_shard(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {"format": "pt"}


def _save_shard(tensors: dict[str, Tensor], metadata: dict[str, str], path: Path) -> None:
    """Write under another name first: an interrupted merge leaves no file that looks whole."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        written = Path(scratch) / path.name
        save_file({key: value.contiguous() for key, value in tensors.items()}, written, metadata=metadata)
        written.replace(path)


def _clear_weights(output: Path) -> None:
    """A model.safetensors of an earlier merge would be loaded in place of new shards."""
    for file in [*output.glob("model*.safetensors"), output / _INDEX]:
        file.unlink(missing_ok=True)
