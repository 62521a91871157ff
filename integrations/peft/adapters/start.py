"""A fresh adapter directory: what `get_peft_model(...).save_pretrained` would write, from the base model's files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from ndlora_plugins.adapter import LayerAdapter
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.fused import cast_factors
from ndlora_plugins.starts.base import Seen

from ..configuration.config import NdLoraConfig
from ..files.base import BaseFiles, NotInFilesError
from ..files.directories import check_new, local_directory, new_directory
from ..files.write import NewLayer, write_adapter
from ..layers.shared import Bank
from ..skeleton import config_of_model, model_on_meta
from ..tuner.checks import check_shared
from ..tuner.fingerprint import FingerprintedLayer, make_fingerprint
from ..tuner.targets import (
    Planned,
    fill_in_targets,
    layer_generator,
    matched_targets,
    plan_targets,
)

__all__ = ["InitReport", "init_adapter"]

_NAME = "default"
# class of a model -> task, by its ending
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


@dataclass(frozen=True)
class InitReport:
    """The adapter that `init_adapter` wrote.

    Attributes:
        trainable, numbers: that train, and that are in the file.
    """

    directory: Path
    method: str
    layers: int
    trainable: int
    numbers: int


def init_adapter(
    model: str, output: str | Path, config: NdLoraConfig, *, trust_remote_code: bool = False
) -> InitReport:
    """Write a fresh adapter of `model`, which any host resumes that takes an adapter's directory.

    With a `random_seed` it is the adapter that `get_peft_model` makes of a float32 model. The weights are read one at a
    time, and only where the start reads them; a `config.json` is then all that is needed of the model.

    Args:
        model: a directory, or a name on the hub.
        output: a directory that does not exist yet, or an empty one; it appears when it is whole.
        config: of the adapter; the model's name and, where its class tells it, the task are filled in.

    Raises:
        NdLoraValueError: the start reads gradients, or nothing in the model can be adapted.
        OSError: a file cannot be read or written.
    """
    check_new(output)
    if config.modules_to_save or config.trainable_token_indices or config.bias != "none":
        raise NdLoraValueError(
            "modules_to_save, trainable_token_indices and bias train the model's own tensors, of which a fresh adapter "
            "holds none: add the adapter with get_peft_model and save it."
        )
    files, skeleton = _open(model, config, trust_remote_code)
    config.base_model_name_or_path = model
    named = type(skeleton).__name__
    config.task_type = config.task_type or next(
        (task for end, task in _TASKS.items() if named.endswith(end)), None
    )
    fill_in_targets(config, skeleton)
    planned = plan_targets(config, matched_targets(config, skeleton), config.resolved())
    if not planned:
        raise NdLoraValueError(
            f"target_modules={config.target_modules!r} match no layer of {model!r}. Leave them out to adapt every "
            f"linear layer."
        )
    check_shared(planned)
    bank = Bank()
    with torch.no_grad():
        layers = [_start(each, config, files, bank) for each in planned]
    config.base_fingerprint = make_fingerprint([_fingerprinted(each, files) for each in planned])
    with new_directory(output) as directory:
        numbers = write_adapter(directory, config, layers, {})
    shared = {
        key: count for layer in layers for key, count in layer.plan.shared_sizes(layer.plan.trained).items()
    }
    trainable = sum(layer.plan.num_parameters for layer in layers) + sum(shared.values())
    return InitReport(Path(output), config.resolved().method.name, len(layers), trainable, numbers)


def _open(model: str, config: NdLoraConfig, trust_remote_code: bool) -> tuple[BaseFiles | None, nn.Module]:
    reads = config.resolved().start.reads
    if "gradient" in reads:
        raise NdLoraValueError(
            f"init_lora_weights={config.resolved().start.name!r} reads gradients, which a directory has not: call "
            f"ndlora_plugins.measure_gradients(model, config, step) and get_peft_model."
        )
    directory = local_directory(model, "config.json")
    try:
        files = BaseFiles.open(str(directory), trust_remote_code=trust_remote_code)
    except NotInFilesError as error:  # no safetensors, or quantised
        if "weight" in reads:
            raise NdLoraValueError(
                f"init_lora_weights={config.resolved().start.name!r} reads the weights. {error}"
            ) from error
        found = config_of_model(str(directory), trust_remote_code=trust_remote_code)
        return None, model_on_meta(found, trust_remote_code=trust_remote_code)
    return files, files.model


def _start(planned: Planned, config: NdLoraConfig, files: BaseFiles | None, bank: Bank) -> NewLayer:
    plan: LayerAdapter = planned.plan
    target = planned.target
    weight = files.weight(target.name) if files is not None and "weight" in plan.start.reads else None
    shared = bank.start_values(_NAME, plan)
    seen = Seen(weight, None, shared, config.random_seed or 0, target.name)
    trained, frozen = plan.initialize(seen, layer_generator(config.random_seed, target.path))
    trained, frozen = cast_factors(trained, torch.float32), cast_factors(frozen, torch.float32)
    bank.keep(_NAME, plan, trained, frozen)
    return NewLayer(target.path, target.name, planned.form, plan, trained, frozen)


def _fingerprinted(planned: Planned, files: BaseFiles | None) -> FingerprintedLayer:
    target, form = planned.target, planned.form
    weight, storage = None, "unknown"
    if files is not None:
        weight, storage = partial(files.weight, target.name), files.storage(target.name)
    return FingerprintedLayer(target.name, (form.out_features, form.in_features), weight, storage)
