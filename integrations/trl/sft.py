"""`ndlora sft`: the YAML of `trl sft`, with one addition, `ndlora:`. TRL's own command knows LoRA only."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import yaml
from torch import nn
from transformers import TrainerCallback

from ndlora_plugins.errors import MissingExtraError, NdLoraValueError

from ..peft.choose import fields_within
from ..peft.configuration.config import NdLoraConfig
from ..peft.configuration.validation import fields_to_set
from .callback import NdLoraCallback, make_callback
from .card import keep_model_card

try:
    import trl
except ModuleNotFoundError as error:
    if error.name != "trl":
        raise
    raise MissingExtraError(
        '`ndlora sft` needs TRL: run `pip install "ndlora-plugins[trl]"`. NdLoraCallback works without it.'
    ) from error

__all__ = ["NdLoraArguments", "Run", "load_data", "main", "make_config", "make_trainer", "read_run"]

# trl.ModelConfig's field -> ours; each counts only where it is given, as its default is LoRA's
_TAKEN_OVER = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
    "lora_task_type": "task_type",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}


@dataclass
class NdLoraArguments:
    """The arguments that are added to TRL's.

    Attributes:
        ndlora: a method's name, or a mapping of NdLoraConfig's options (docs/options.md), with `callback` a
            mapping of NdLoraCallback's, or `parameters`, a budget in place of the method. TRL's `lora_*` keys keep
            their meaning; what stands here goes first.
        schedules: what happens in training beside the loss, as NdLoraConfig takes it.
    """

    ndlora: str | None = field(
        default=None,
        metadata={
            "help": "A method's name, or (in YAML, or as JSON) a mapping of NdLoraConfig's options, with "
            "`callback:` a mapping of NdLoraCallback's and `parameters:` a budget such as 1M, which chooses method and "
            "options. TRL's lora_* keys keep their meaning; what is given here goes first."
        },
    )
    schedules: str | None = field(
        default=None,
        metadata={
            "aliases": ["--schedule"],
            "help": "A schedule's name, or (in YAML, or as JSON) names or a mapping of names to options: "
            "docs/schedules.md.",
        },
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune as `trl sft` does, with an NDLORA adapter: `main(["--config", "run.yaml"])`.

    Args:
        argv: the command line, `sys.argv[1:]` by default. Flags overrule the YAML.

    Raises:
        NdLoraValueError: an argument that nobody knows, or one that cannot apply.
    """
    run = read_run(list(sys.argv[1:] if argv is None else argv), "ndlora sft")
    _train(run, *make_config(run, run.ndlora))


class Run(NamedTuple):
    """The YAML and the command line: TRL's arguments, ours, and the names of those that were given."""

    script: trl.ScriptArguments
    training: trl.SFTConfig
    model: trl.ModelConfig
    mixture: trl.DatasetMixtureConfig
    ndlora: Any
    schedules: Any
    given: set[str]


def read_run(argv: list[str], command: str) -> Run:
    """Read `--config FILE.yaml` and the flags that overrule it, as TRL does.

    Raises:
        NdLoraValueError: an argument that nobody knows, or a value that TRL or transformers refuse.
    """
    types = (trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, trl.DatasetMixtureConfig, NdLoraArguments)
    parser = trl.TrlParser(
        cast(Any, types),  # their annotation is a NewType of transformers that no class is of
        prog=command,
        description="Fine-tune with TRL: the YAML and the options of `trl sft`, and an `ndlora:` block.",
        epilog="Example: ndlora sft --config run.yaml",
        allow_abbrev=False,  # `_given` knows whole names
    )
    try:
        script, training, model, mixture, ours, unknown = parser.parse_args_and_config(
            argv, return_remaining_strings=True
        )
    except (ValueError, yaml.YAMLError) as error:  # of TRL's and transformers' own checks
        said = " ".join(str(error).split())
        remedy = " TRL's default is true: write `bf16: false` to train on a CPU." if "bf16" in said else ""
        raise NdLoraValueError(f"The arguments of `{command}` cannot work: {said}{remedy}") from error
    if unknown:
        raise NdLoraValueError(
            f"Unknown arguments {unknown}: take them out. `trl sft --help` lists TRL's, `ndlora:` takes "
            f"NdLoraConfig's options, and those of `accelerate launch` go before `{command}`."
        )
    return Run(script, training, model, mixture, ours.ndlora, ours.schedules, _given(argv))


def make_config(run: Run, ndlora: str | Mapping[str, Any] | None) -> tuple[NdLoraConfig, NdLoraCallback]:
    """The adapter's configuration and the callback, from TRL's arguments and ours.

    Args:
        run: of TRL's arguments only those count that were given, no defaults.
        ndlora: as `NdLoraArguments.ndlora` has it, in place of the run's.

    Raises:
        NdLoraValueError: an unknown option, or a value that cannot work.
    """
    model, given, schedules = run.model, run.given, run.schedules
    if "use_peft" in given and not model.use_peft:
        raise NdLoraValueError("use_peft: false, but `ndlora sft` always trains an adapter: take it out.")
    options = _as_mapping(ndlora)
    callback = make_callback(options.pop("callback", None) or {}, "ndlora.callback")
    parameters = options.pop("parameters", None)
    known = {field.name for field in fields_to_set(NdLoraConfig)} | set(_TAKEN_OVER.values())
    unknown = sorted(set(options) - known)
    if unknown:
        raise NdLoraValueError(f"ndlora: unknown options {unknown}. Known: {', '.join(sorted(known))}.")
    taken = {ours: getattr(model, theirs) for theirs, ours in _TAKEN_OVER.items() if theirs in given}
    if schedules is not None:
        if isinstance(schedules, str) and schedules.lstrip().startswith(("{", "[")):
            schedules = _from_json(schedules, "--schedules")
        options = {"schedules": schedules, **options}
    fields = {"task_type": model.lora_task_type, **taken, **options}
    if parameters is not None:
        fields_within(parameters, fields)  # wrong ones are found before the model is looked at
        fields = fields_within(parameters, fields, _without_weights(model, run.training.trust_remote_code))
    return NdLoraConfig(**fields), callback


def _without_weights(model: trl.ModelConfig, trusted: bool) -> nn.Module:
    """The model that will be trained, on the "meta" device."""
    from transformers import AutoConfig

    from ..peft.skeleton import model_on_meta

    config = AutoConfig.from_pretrained(
        cast(str, model.model_name_or_path), revision=model.model_revision, trust_remote_code=trusted
    )
    return model_on_meta(config, trust_remote_code=trusted)


def _as_mapping(ndlora: str | Mapping[str, Any] | None) -> dict[str, Any]:
    if ndlora is None:
        return {}
    if isinstance(ndlora, str):
        if not ndlora.lstrip().startswith("{"):
            return {"method": ndlora}
        ndlora = _from_json(ndlora, "--ndlora")
    if not isinstance(ndlora, Mapping):
        raise NdLoraValueError(f"ndlora: {ndlora!r}: give a method's name or a mapping of options.")
    return dict(ndlora)


def _from_json(text: str, flag: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise NdLoraValueError(f"{flag} {text}: no JSON object ({error}).") from error


def _given(argv: Sequence[str]) -> set[str]:
    """The arguments that stand in the YAML or on the command line."""
    flags = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    if "--config" in argv:
        with open(argv[argv.index("--config") + 1], encoding="utf-8") as file:
            flags |= set(yaml.safe_load(file))
    return flags


def _train(run: Run, config: NdLoraConfig, callback: NdLoraCallback) -> None:
    """As trl/scripts/sft.py does it."""
    data = load_data(run)
    held_out = data[run.script.dataset_test_split] if run.training.eval_strategy != "no" else None
    trainer = make_trainer(run, config, [callback], data[run.script.dataset_train_split], held_out)
    keep_model_card(trainer)
    trainer.train(resume_from_checkpoint=run.training.resume_from_checkpoint)
    trainer.save_model(run.training.output_dir)
    if run.training.push_to_hub:
        trainer.push_to_hub(dataset_name=run.script.dataset_name)
    if hasattr(trainer, "end"):  # transformers 5.18 and later: closes trackers and process group
        trainer.end()


def make_trainer(
    run: Run, config: NdLoraConfig, callbacks: list[TrainerCallback], training_data: Any, held_out: Any
) -> trl.SFTTrainer:
    """TRL's trainer of one adapter, the model loaded anew."""
    training, model = run.training, run.model
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **cast("dict[str, Any]", training.model_init_kwargs or {}),
    }
    return trl.SFTTrainer(
        model=cast(str, model.model_name_or_path),
        args=training,
        train_dataset=training_data,
        eval_dataset=held_out,
        quantization_config=trl.get_quantization_config(model),
        peft_config=config,
        callbacks=callbacks,
    )


def load_data(run: Run) -> Any:
    """The splits that the YAML names.

    Raises:
        NdLoraValueError: it names none.
    """
    script, mixture = run.script, run.mixture
    if mixture.datasets:
        return trl.get_dataset(mixture)
    if not script.dataset_name:
        raise NdLoraValueError("No data: give dataset_name or datasets, as `trl sft` takes them.")
    from datasets import load_dataset

    return load_dataset(script.dataset_name, name=script.dataset_config, streaming=script.dataset_streaming)


if __name__ == "__main__":
    main()
