"""`NdLoraConfig`: the options, as PEFT's `LoraConfig` has them where they mean the same.

The core is imported when it is first used: registration runs at every `import peft`, so it loads little.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME
from peft.utils.other import get_pattern_key
from peft.utils.peft_types import PeftType

from ndlora_plugins.errors import NdLoraValueError

from ..names import NAME, extend_enum
from .lora_keywords import LoraKeywords, refuse_keywords
from .session import Session
from .training_fields import TrainingFields
from .validation import (
    Alpha,
    Bias,
    CrossedModes,
    Dropout,
    Indices,
    Modes,
    NumModes,
    Pattern,
    Patterns,
    Rank,
    Rows,
    Schema,
    Targets,
    check_fields,
)

if TYPE_CHECKING:
    from ndlora_plugins.options import AdapterOptions

__all__ = ["NdLoraConfig", "SCHEMA_VERSION"]

# of adapter_config.json; raised when the meaning of a field or of a tensor changes
SCHEMA_VERSION = 2

_SIDES = {"in_modes", "out_modes"}


def _written(text: str) -> Any:
    """A field that is written when an adapter is saved."""
    return field(default=None, metadata={"help": f"{text} Not set by hand.", "written": True})


@dataclass
class NdLoraConfig(PeftConfig, TrainingFields, LoraKeywords):
    """Configuration of an NDLORA adapter: `get_peft_model(model, NdLoraConfig())`.

    The fields are documented where they stand (`metadata["help"]`); docs/options.md lists them all.

    Raises:
        NdLoraValueError: from `__init__`, for a value that cannot work, before any model is touched.
    """

    method: str | None = field(
        default=None,
        metadata={
            "help": "One that `ndlora methods` lists. Left out, it follows from `init_lora_weights` where that is the "
            "start of one method, else it is the first of the list: two modes that cross."
        },
    )
    r: Rank | None = field(
        default=None,
        metadata={
            "help": "The rank in the method's own sense: Kronecker terms for methods with modes, the rank of the "
            "product for the others. `ndlora methods` has each one's default."
        },
    )
    lora_alpha: Alpha | None = field(
        default=None,
        metadata={
            "help": "scaling = lora_alpha / r, or / sqrt(r) with `use_rslora`. Default: what the method's start is "
            "made for, 8 for Kronecker terms and 16, as in LoRA recipes, for most others (`ndlora methods` says "
            "which); else r: scaling is 1. Layers with a rank of their own keep it, as in LoraConfig."
        },
    )
    lora_dropout: Dropout = field(
        default=0.0,
        metadata={
            "help": "Dropout on the adapter's input, in [0, 1). An embedding's input are indices: none there."
        },
    )
    init_lora_weights: bool | str | None = field(
        default=True,
        metadata={
            "help": "True: the method's own start, which leaves the model's function as it is. False: random and "
            "not zero (for tests). Or the name of a start that fits the method; `ndlora methods` lists them."
        },
    )
    anchor: str | None = field(
        default=None,
        metadata={
            "help": "'snapshot': a start that is not zero is subtracted, so the model begins as it is. 'none': as "
            "the reference code. Default 'snapshot' where the start would move the model."
        },
    )
    options: dict[str, Any] | None = field(
        default=None,
        metadata={
            "help": "The method's own options, by name: {'equation': 'out r, r in -> out in'}. `ndlora methods --json` "
            "lists each one's."
        },
    )
    num_modes: NumModes | None = field(
        default=None,
        metadata={
            "help": "Into how many modes in and out features are split; 2, where the method has no other default. "
            "`NdLoraConfig(num_modes=3)` alone is the default method with three modes that cross. Experts, and the "
            "height and width of a kernel, are modes of their own beside them."
        },
    )
    crossed_modes: CrossedModes | None = field(
        default=None,
        metadata={
            "help": "Modes that cross, in = (n, in / n) and out = (out / n, n), n the largest common divisor up to "
            "this number. The default method has 4; `NdLoraConfig(crossed_modes=8)` alone is that method with 8. A "
            "term has in + out parameters, as LoRA r=1 has, and is an exact LoRA of rank n * n. With `num_modes=3`, "
            "(n, n, in / n / n) and (out / n / n, n, n): about 1 / n of that, rank n * n * n. Layers that `modes` "
            "names keep those."
        },
    )
    modes: Modes | None = field(
        default=None,
        metadata={
            "help": "Modes by hand: {'in_modes': [32, 64], 'out_modes': [32, 64]} for all layers, or one such "
            "dict for each target: {'q_proj': {'in_modes': [32, 64]}}. The names match as in rank_pattern."
        },
    )
    random_seed: int | None = field(
        default=None,
        metadata={"help": "Makes the start reproducible; the global random generator is then not touched."},
    )
    target_modules: Targets | None = field(
        default=None,
        metadata={
            "help": "Names (the end of the path is enough), a regex, or 'all-linear' (default): every linear "
            "layer but the output layer. Of multimodal models 'language-linear' and 'vision-linear' take one part."
        },
    )
    exclude_modules: Targets | None = field(
        default=None, metadata={"help": "Names or a regex of modules that get no adapter."}
    )
    layers_to_transform: Indices | None = field(
        default=None, metadata={"help": "The layer indices that get an adapter, if not all of them."}
    )
    layers_pattern: Patterns | None = field(
        default=None,
        metadata={
            "help": "The name of the layer list, where `layers_to_transform` cannot tell it by itself."
        },
    )
    rank_pattern: dict[Pattern, Rank] = field(
        default_factory=dict,
        metadata={"help": "Layer name or regex to a rank other than `r`, as in LoraConfig."},
    )
    alpha_pattern: dict[Pattern, Alpha] = field(
        default_factory=dict,
        metadata={"help": "Layer name or regex to an alpha other than `lora_alpha`, as in LoraConfig."},
    )
    modules_to_save: list[Pattern] | None = field(
        default=None, metadata={"help": "Modules that are trained in full and saved with the adapter."}
    )
    bias: Bias = field(
        default="none",
        metadata={
            "help": "Which biases of the base model train: 'none', 'all' or 'ndlora_only' (those of adapted layers; "
            "'lora_only' means it too)."
        },
    )
    fan_in_fan_out: bool | None = field(
        default=False,
        metadata={
            "help": "Accepted for compatibility: the way a layer stores its weight is seen from its type."
        },
    )
    use_rslora: bool | None = field(default=False, metadata={"help": "scaling = lora_alpha / sqrt(r)."})
    trainable_token_indices: Rows | None = field(
        default=None, metadata={"help": "Rows of the embedding that are trained and saved, as in LoraConfig."}
    )
    target_parameters: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of bare parameters, matrices (out, in) or stacks of them (experts, out, in), as in "
            "LoraConfig: 'mlp.experts.down_proj'. Without `target_modules` nothing else is adapted."
        },
    )
    ensure_weight_tying: bool | None = field(
        default=False,
        metadata={"help": "Keep tied embeddings tied in `modules_to_save` and `trainable_token_indices`."},
    )
    save_frozen: bool | None = field(
        default=False,
        metadata={
            "help": "Save frozen factors too that are made again from the base weight or a seed at load."
        },
    )
    base_fingerprint: dict | None = _written("At save: what its base model looked like.")
    weight_forms: dict | None = _written(
        "As `layers`, in files of schema 1: of the layers that are not linear."
    )
    layers: dict | None = _written("At save: each layer in the file, its name, kind and shape.")
    checksums: dict | None = _written("At save: of factors that are made again at load.")
    schema_version: Schema = field(
        default=SCHEMA_VERSION, metadata={"help": "Of this file. Not set by hand.", "written": True}
    )

    def __post_init__(self, *refused):
        refuse_keywords(refused)
        if isinstance(self.schema_version, int) and self.schema_version > SCHEMA_VERSION:
            raise NdLoraValueError(
                f"This adapter_config.json has schema_version={self.schema_version}; the installed ndlora-plugins "
                f"reads up to {SCHEMA_VERSION}. Upgrade it: pip install -U ndlora-plugins."
            )
        check_fields(self)
        try:
            super().__post_init__()
        except ValueError as error:  # a task that PEFT does not know
            raise NdLoraValueError(f"task_type={self.task_type!r}: {error}") from error
        self.peft_type = extend_enum(PeftType, NAME, NAME)
        resolved = self.resolved()
        self.method, self.r = resolved.method.name, resolved.rank
        self.lora_alpha, self.anchor = resolved.alpha, resolved.anchor
        # saved as they are now, whatever a later default may be
        for name in {"num_modes", "crossed_modes"} & {each.name for each in fields(resolved.options)}:
            setattr(self, name, getattr(resolved.options, name))
        self.settle_schedules(resolved.method, self.base_fingerprint is not None)
        self._check_targets()
        self.session = Session()

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str) and not self.target_modules.endswith("-linear"):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise NdLoraValueError(
                        f"`{name}` cannot be used when `target_modules` is a str ({self.target_modules!r}): put "
                        f"the layer indices into the regex, or give target_modules as a list of names."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise NdLoraValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified."
            )
        if self.bias == "lora_only":
            self.bias = "ndlora_only"

    def resolved(self) -> AdapterOptions:
        """The core's options, all defaults filled in, of a layer that no pattern names.

        Raises:
            NdLoraValueError: a value that cannot work.
        """
        from ndlora_plugins.options import adapter_options

        modes = self.modes if self.modes and _SIDES & set(self.modes) else {}
        return adapter_options(
            self.method,
            self.init_lora_weights,
            self.r,
            self.lora_alpha,
            bool(self.use_rslora),
            self.anchor,
            self._method_options(modes),
            bool(self.save_frozen),
        )

    def options_for(self, layer: str, resolved: AdapterOptions | None = None) -> AdapterOptions:
        """The core's options for one layer, patterns applied.

        Args:
            layer: the module's full name in the model, without the name of the adapter.
            resolved: what `resolved` gave, where it is asked for many layers.
        """
        from ndlora_plugins.methods.options import make_options

        found = resolved or self.resolved()
        rank, alpha = _of_pattern(self.rank_pattern, layer), _of_pattern(self.alpha_pattern, layer)
        modes = {} if not self.modes or _SIDES & set(self.modes) else _of_pattern(self.modes, layer)
        return replace(
            found,
            rank=rank or found.rank,
            alpha=found.alpha if alpha is None else alpha,
            options=make_options(found.method, self._method_options(modes)) if modes else found.options,
        )

    def _method_options(self, modes: Mapping[str, Any]) -> dict[str, Any]:
        """`options`, and those of the fields above that the method has as options of its own."""
        from ndlora_plugins.registry import option_names

        given = {"num_modes": self.num_modes, "crossed_modes": self.crossed_modes, **modes}
        known = option_names(self.method, self.init_lora_weights)
        said = {name: value for name, value in given.items() if value is not None and name in known}
        return said | (self.options or {})

    def to_dict(self) -> dict:
        """The fields, with what this session knows of the base model unless it was loaded."""
        fields = super().to_dict()
        for name in ("base_fingerprint", "layers", "checksums"):
            if fields[name] is None:
                fields[name] = getattr(self.session, name)
        if fields["layers"] is not None:
            fields["weight_forms"], fields["schema_version"] = None, SCHEMA_VERSION
        return fields

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Save as PEFT does, but patterns keep their order; README.md beside an adapter is brought up to date too."""
        from ..files.card import write_model_card

        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory, CONFIG_NAME)
        # PEFT sorts the keys of all dicts, but of the patterns that match a layer the first one counts
        patterns = {name: getattr(self, name) for name in ("rank_pattern", "alpha_pattern", "modes")}
        path.write_text(json.dumps({**json.loads(path.read_text()), **patterns}, indent=2))
        write_model_card(self, save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs) -> Any:
        """Load adapter_config.json. A tensor file beside it is checked too, so that a broken one changes no model.

        Raises:
            NdLoraValueError: the tensor file is truncated, empty, or no safetensors file.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        directory = Path(pretrained_model_name_or_path, subfolder or "")
        from ..files.tensors import ADAPTER_FILE, check_adapter_file

        # a configuration may stand alone, and a pickle file is PEFT's affair: it loads tensors only from one
        if (directory / ADAPTER_FILE).is_file():
            check_adapter_file(str(directory))
        return config


def _of_pattern(pattern: Mapping[str, Any], layer: str) -> Any:
    """What a pattern says of a layer, or None."""
    return pattern.get(get_pattern_key(list(pattern), layer))
