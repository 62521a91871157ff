"""`NdLoraConfig`: the options, as PEFT's `LoraConfig` has them where they mean the same.

The core is imported when it is first used: registration, which runs at `import peft`, is to cost under 5 ms.
"""

from __future__ import annotations

import json
import os
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from peft.config import PeftConfig
from peft.utils import CONFIG_NAME
from peft.utils.other import get_pattern_key
from peft.utils.peft_types import PeftType

from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.registration import NAME, extend_enum
from ndlora_plugins.integrations.peft.validation import (
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
    from ndlora_plugins.adapter import AdapterOptions

__all__ = ["NdLoraConfig", "SCHEMA_VERSION"]

# of adapter_config.json; raised when the meaning of a field or of a tensor changes
SCHEMA_VERSION = 1

# keywords of LoraConfig that have no meaning here -> what to do instead
_REFUSED = {
    "use_dora": "the magnitude vector is defined for LoRA's product only; leave it out",
    "use_qalora": "it is defined for LoRA's product only; leave it out",
    "qalora_group_size": "it belongs to use_qalora; leave it out",
    "use_bdlora": "it is defined for LoRA's product only; leave it out",
    "loftq_config": "LoftQ computes LoRA's two matrices; use init_lora_weights='n_lora' or True instead",
    "eva_config": "EVA computes LoRA's two matrices; use init_lora_weights=True instead",
    "corda_config": "CorDA computes LoRA's two matrices; use init_lora_weights=True instead",
    "lora_ga_config": "LoRA-GA computes LoRA's two matrices; use init_lora_weights=True instead",
    "alora_invocation_tokens": "activated LoRA is defined for LoRA's product only; leave it out",
    "megatron_config": "Megatron layers are not supported; leave it out",
    "megatron_core": "Megatron layers are not supported; leave it out",
    "layer_replication": "it writes new layers into the model; replicate them before the adapter is added",
    "lora_bias": "a biased update cannot be merged and has no place in these methods; use bias='all' instead",
    "arrow_config": "Arrow routes between LoRA adapters; leave it out",
    "velora_config": "VeLoRA compresses what LoRA's product keeps for backward; leave it out",
    "monteclora_config": "MonteCLoRA samples LoRA's matrices; leave it out",
    "kasa_config": "KaSA is defined for LoRA's product only; leave it out",
}
# what LoraConfig itself fills in, so that all its fields can be passed on
_WITHOUT_EFFECT = {"qalora_group_size": 16, "megatron_core": "megatron.core"}


@dataclass
class NdLoraConfig(PeftConfig):
    """Configuration of an NDLORA adapter: `get_peft_model(model, NdLoraConfig())`.

    The fields are documented where they stand (`metadata["help"]`); docs/options.md lists them all.

    Raises:
        NdLoraValueError: from `__init__`, for a value that cannot work, before any model is touched.
    """

    method: str | None = field(
        default=None,
        metadata={
            "help": "'ndlinear', 'slora', 'nlora', 'inttune' or one of an installed plugin. Left out, it follows "
            "from `init_lora_weights` ('n_lora' means nlora, 's_lora' means slora), else it is 'ndlinear'."
        },
    )
    r: Rank | None = field(
        default=None,
        metadata={
            "help": "The rank in the method's own sense: Kronecker terms for ndlinear (default 1), the rank for "
            "the others (default 8)."
        },
    )
    lora_alpha: Alpha | None = field(
        default=None,
        metadata={
            "help": "scaling = lora_alpha / r, or / sqrt(r) with `use_rslora`. Default: 16, as in LoRA recipes, for "
            "the starts 'lora_step', 'kronecker', 'n_lora_step' and 'n_lora_pivots', which are made for it; else r: "
            "scaling is 1."
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
            "not zero (for tests). Or a name: 'lora_step', 'kronecker', 'zero_mode', 'ndlinear' (the reference's), "
            "'s_lora', 'n_lora', 'n_lora_step', 'n_lora_pivots', or one of a plugin; `ndlora methods` says what each "
            "is."
        },
    )
    anchor: str | None = field(
        default=None,
        metadata={
            "help": "'snapshot': a start that is not zero is subtracted, so the model begins as it is. 'none': as "
            "the reference code. Default 'snapshot' where the start would move the model."
        },
    )
    num_modes: NumModes = field(
        default=2,
        metadata={
            "help": "Into how many modes in and out features are split, as evenly as it comes. Experts, and the "
            "height and width of a kernel, are modes of their own beside them."
        },
    )
    crossed_modes: CrossedModes | None = field(
        default=None,
        metadata={
            "help": "Uneven modes that cross instead: in = (n, in / n) and out = (out / n, n), n the largest common "
            "divisor up to this number. A term has in + out parameters, as LoRA r=1 has, and is an exact LoRA of "
            "rank n * n. With `num_modes=3`, (n, n, in / n / n) and (out / n / n, n, n): about 1 / n of that, rank "
            "n * n * n. Layers that `modes` names keep those."
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
            "layer but the output layer."
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
    base_fingerprint: dict | None = field(
        default=None,
        metadata={
            "help": "Written when an adapter is saved: what its base model looked like. Not set by hand."
        },
    )
    weight_forms: dict | None = field(
        default=None,
        metadata={
            "help": "Written when an adapter is saved: which of its layers are not linear, and what they are. Not set "
            "by hand."
        },
    )
    schema_version: Schema = field(
        default=SCHEMA_VERSION, metadata={"help": "Of this file. Not set by hand."}
    )
    use_dora: InitVar = None
    use_qalora: InitVar = None
    qalora_group_size: InitVar = None
    use_bdlora: InitVar = None
    loftq_config: InitVar = None
    eva_config: InitVar = None
    corda_config: InitVar = None
    lora_ga_config: InitVar = None
    alora_invocation_tokens: InitVar = None
    megatron_config: InitVar = None
    megatron_core: InitVar = None
    layer_replication: InitVar = None
    lora_bias: InitVar = None
    arrow_config: InitVar = None
    velora_config: InitVar = None
    monteclora_config: InitVar = None
    kasa_config: InitVar = None

    def __post_init__(self, *refused):
        from ndlora_plugins.adapter import resolve_alpha, resolve_anchor
        from ndlora_plugins.registry import method_and_initializer

        for keyword, value in zip(_REFUSED, refused, strict=True):
            if value and value != _WITHOUT_EFFECT.get(keyword):
                raise NdLoraValueError(
                    f"{keyword}={value!r} is an option of LoraConfig that NdLoraConfig does not have: "
                    f"{_REFUSED[keyword]}."
                )
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
        method, initializer = method_and_initializer(self.method, self.init_lora_weights)
        self.method = method.name
        self.r = method.default_rank if self.r is None else self.r
        self.lora_alpha = resolve_alpha(self.lora_alpha, self.r, initializer)
        self.anchor = resolve_anchor(self.anchor, initializer)
        self._check_targets()
        # of this session's base model; become `base_fingerprint` and `weight_forms` when saved
        self._session_fingerprint = None
        self._session_weight_forms = None

    def _check_targets(self) -> None:
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
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

    def options_for(self, layer: str) -> AdapterOptions:
        """The core's options for one layer, patterns applied.

        Args:
            layer: the module's full name in the model, without the name of the adapter.
        """
        from ndlora_plugins.adapter import AdapterOptions

        modes = self.modes or {}
        if modes and not {"in_modes", "out_modes"} & set(modes):
            modes = modes.get(get_pattern_key(modes.keys(), layer), {})
        return AdapterOptions(
            method=self.method,
            init_lora_weights=self.init_lora_weights,
            rank=self.rank_pattern.get(get_pattern_key(self.rank_pattern.keys(), layer), self.r),
            alpha=self.alpha_pattern.get(get_pattern_key(self.alpha_pattern.keys(), layer), self.lora_alpha),
            use_rslora=self.use_rslora,
            anchor=self.anchor,
            num_modes=self.num_modes,
            crossed_modes=self.crossed_modes,
            in_modes=modes.get("in_modes"),
            out_modes=modes.get("out_modes"),
        )

    def to_dict(self) -> dict:
        """The fields, with what this session knows of the base model unless it was loaded."""
        fields = super().to_dict()
        if self.base_fingerprint is None:
            fields["base_fingerprint"] = self._session_fingerprint
        if self.weight_forms is None:
            fields["weight_forms"] = self._session_weight_forms
        return fields

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """As PEFT's, but patterns keep their order; beside an adapter's file README.md is brought up to date too."""
        from ndlora_plugins.integrations.peft.model_card import write_model_card

        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory, CONFIG_NAME)
        # PEFT sorts the keys of all dicts, but of the patterns that match a layer the first one counts
        patterns = {name: getattr(self, name) for name in ("rank_pattern", "alpha_pattern", "modes")}
        path.write_text(json.dumps({**json.loads(path.read_text()), **patterns}, indent=2))
        write_model_card(self, save_directory)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        """Load adapter_config.json. A tensor file beside it is checked too, so that a broken one changes no model.

        Raises:
            NdLoraValueError: the tensor file is truncated, empty, or no safetensors file.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        directory = os.path.join(pretrained_model_name_or_path, subfolder or "")
        from ndlora_plugins.integrations.peft.files import ADAPTER_FILE, check_adapter_file

        # a configuration may stand alone, and a pickle file is PEFT's affair: it loads tensors only from one
        if os.path.isfile(os.path.join(directory, ADAPTER_FILE)):
            check_adapter_file(directory)
        return config
