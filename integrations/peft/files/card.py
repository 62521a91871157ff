"""The README.md beside a saved adapter: what it is, how to load it, what it was made with."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

from ndlora_plugins.errors import NdLoraWarning

from ..configuration.validation import fields_to_set
from ..names import METHOD_NAME, PREFIX
from .tensors import ADAPTER_FILE

__all__ = ["note_picture", "note_training", "write_model_card"]

Config = Any  # an NdLoraConfig, whose module imports this one

_BEGIN = "<!-- ndlora: this part is written anew at each save, all else is left as it is -->"
_END = "<!-- end of ndlora -->"
_REPOSITORY = "https://github.com/ndlora-plugins/ndlora-plugins"
_ADAPTER_TAG = "base_model:adapter:"  # PEFT's, with the base model's name behind it
# fields that are said elsewhere in the card, or say nothing of the recipe
_NOT_LISTED = {"method", "random_seed"}
# task -> transformers' class of the base model
_MODEL_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_TEXT = """\
## NDLORA adapter

An adapter for {base}, made with [PEFT](https://github.com/huggingface/peft) and
[ndlora-plugins]({repository}): {counts}. Method `{method}`: {summary} ({source}).

With `pip install ndlora-plugins`, and no import of it:

```python
from peft import PeftModel
from transformers import {model_class}

base = {model_class}.from_pretrained("{base_name}")
model = PeftModel.from_pretrained(base, "PATH_OF_THIS_ADAPTER")
```

If that ends in `KeyError: 'NDLORA'`, PEFT is kept from finding the package, by `TORCH_DEVICE_BACKEND_AUTOLOAD=0` or
`NDLORA_AUTOLOAD=0`: write `import ndlora_plugins` above.

Without it, export the adapter once where the package is installed. The command says how exact the result is, and asks
for a `--rank` where there is no exact one:

```bash
ndlora export PATH_OF_THIS_ADAPTER --to lora --output plain-lora --base "{base_name}"
```

`plain-lora` is a plain LoRA adapter for PEFT; `--to merged` writes the whole model.
{serving}{picture}
| recipe | |
|---|---|
{recipe}
"""
# of language models; the export prints the rank
_SERVING = """\

To serve it, with vLLM or, after an export `--to gguf`, with llama.cpp:

```bash
vllm serve "{base_name}" --enable-lora --max-lora-rank RANK --lora-modules my-lora=plain-lora
llama-server -m BASE.gguf --lora plain-gguf/adapter_model.gguf
```

`--self-test` beside either export, and then `ndlora verify`, ask the running server whether it serves the adapter. RANK
is the largest that the export printed, or the next of 1, 8, 16, 32, 64, 128, 256, 320 and 512.
"""
_PICTURE = """\

![Loss and update norms]({name})
"""
_PICTURE_FILE = "ndlora_training.png"


def note_training(config: Config, values: Mapping[str, Any]) -> None:
    """Let cards that are written later in this session name these too: learning rate, steps, and the like."""
    config.session.training = dict(values)


def note_picture(config: Config, path: str | Path) -> None:
    """Let cards that are written later in this session show a PNG of the training; a copy is laid beside them."""
    config.session.picture = Path(path).absolute()


def write_model_card(config: Config, directory: str | Path) -> None:
    """Put our part into `directory`/README.md, and there only: after the first heading, or where it stood before.

    The header gets `library_name` and our tags, and loses a base model that is a directory of
    this machine, which the hub refuses. The hub's template, where nothing was filled in, goes. A card that cannot be
    read is left as it is, with a warning: no save fails for its card.

    Args:
        config: of the adapter.
        directory: where the adapter's file is already; without it (the configuration alone is saved) nothing happens.
    """
    directory = Path(directory)
    if not any((directory / name).is_file() for name in (ADAPTER_FILE, "adapter_model.bin")):
        return
    path = directory / "README.md"
    try:
        card = (
            ModelCard.load(path) if path.is_file() else ModelCard(f"---\n{ModelCardData()}\n---\n# Adapter\n")
        )
        _complete_header(card.data, config)
        card.text = _put_in(_without_template(card.text), _our_part(config, directory))
        card.save(path)
    except Exception as error:
        warnings.warn(
            f"{path} was left as it is: {type(error).__name__}: {error}. The adapter itself was saved.",
            NdLoraWarning,
            stacklevel=2,
        )


def _complete_header(data: Any, config: Config) -> None:
    data.library_name = "peft"  # as PEFT itself has it; TRL writes "transformers"
    tags = [
        tag
        for tag in data.tags or []
        if not tag.startswith(_ADAPTER_TAG) or _is_on_hub(tag.removeprefix(_ADAPTER_TAG))
    ]
    data.tags = list(dict.fromkeys([*tags, METHOD_NAME, config.method]))
    named = [data.base_model] if isinstance(data.base_model, str) else data.base_model or []
    named = [name for name in named if _is_on_hub(name)]
    if not named and _is_on_hub(config.base_model_name_or_path):
        named = [config.base_model_name_or_path]
    data.base_model = named[0] if len(named) == 1 else named or None


def _is_on_hub(name: str | None) -> bool:
    """Whether a name can be one of the hub's; whether the hub has it is not asked."""
    if not name or os.path.exists(name):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _without_template(text: str) -> str:
    """A card that is still the hub's empty template loses it; what PEFT wrote behind it stays."""
    empty, text = ModelCard.from_template(ModelCardData()).text.strip(), text.strip()
    return f"# Adapter\n\n{text.removeprefix(empty).lstrip()}\n" if text.startswith(empty) else text


def _linked(source: str) -> str:
    """A method's source with its papers and pages as links."""
    source = re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", source)
    source = re.sub(r"\b(docs/\w+\.md)", rf"[\1]({_REPOSITORY}/blob/main/\1)", source)
    return re.sub(r"(?<![/\w])github\.com/[\w./-]+", r"<https://\g<0>>", source)


def _put_in(text: str, part: str) -> str:
    before, begin, rest = text.partition(_BEGIN)
    if begin and _END in rest:
        return before + part + rest.partition(_END)[2]
    lines = text.splitlines(keepends=True)
    heading = next((i + 1 for i, line in enumerate(lines) if line.startswith("# ")), 0)
    return f"{''.join(lines[:heading]).rstrip()}\n\n{part}\n\n{''.join(lines[heading:]).lstrip()}"


def _our_part(config: Config, directory: Path) -> str:
    from ndlora_plugins.registry import methods

    base, method = config.base_model_name_or_path, methods()[config.method].value
    on_hub = _is_on_hub(base)
    recipe = {**_options(config), **config.session.training}
    base_name = base if on_hub else "PATH_OF_THE_BASE_MODEL"
    task = getattr(config.task_type, "value", config.task_type)
    text = _TEXT.format(
        method=method.name,
        summary=method.summary,
        source=_linked(method.source),
        repository=_REPOSITORY,
        base=f"[{base}](https://huggingface.co/{base})" if on_hub else "a model that is not named here",
        base_name=base_name,
        counts=_counts(directory / ADAPTER_FILE),
        model_class=_MODEL_CLASSES.get(task, "AutoModel"),
        serving=_SERVING.format(base_name=base_name) if task == "CAUSAL_LM" else "",
        picture=_picture(config.session.picture, directory),
        recipe="\n".join(f"| {name} | {_cell(value)} |" for name, value in recipe.items()),
    )
    return f"{_BEGIN}\n{text}{_END}"


def _picture(path: Path | None, directory: Path) -> str:
    """The picture's line, and a copy of it in the directory; "" without one."""
    if path is None or not path.is_file():
        return ""
    shutil.copyfile(path, directory / _PICTURE_FILE)
    return _PICTURE.format(name=_PICTURE_FILE)


def _options(config: Config) -> dict[str, Any]:
    """The options of an adapter, those that are off or empty left out."""
    return {
        field.name: getattr(config, field.name)
        for field in fields_to_set(config)
        if field.name not in _NOT_LISTED and getattr(config, field.name) not in (None, False, {}, [])
    }


def _cell(value: Any) -> str:
    value = sorted(value) if isinstance(value, set) else value
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _counts(file: Path) -> str:
    if not file.is_file():
        return "saved as a pickle file"
    layers, numbers, others = set(), 0, 0
    with safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():
            size = 1
            for length in tensors.get_slice(key).get_shape():
                size *= length
            layer, ours, _ = key.partition(f".{PREFIX}")
            if ours:
                layers.add(layer)
                numbers += size
            else:
                others += size
    beside = f", and {others:,} of whole modules or tokens beside them" if others else ""
    return f"{numbers:,} numbers in {len(layers)} layers{beside}"
