"""Out of NDLORA: to a stock LoRA or LoKr adapter, or merged into the base model; and to NDLORA of a smaller rank.

The base weights are read only where a method recomputes its start from them, and to merge.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoKrConfig, LoraConfig

from ndlora_plugins.errors import NdLoraValueError, NdLoraWarning

from ...serving.self_test import PROMPTS, make_self_test, write_self_test
from ..adapters.smaller import cut_adapter
from ..files.adapter import AdapterReader
from ..files.directories import check_new, new_directory
from ..files.problems import check_sound
from ..files.tensors import ADAPTER_FILE, save_tensors
from .compress import RankTarget
from .gguf import GGUF_FILE, write_gguf
from .merge import merge_files
from .stock import (
    VLLM_RANKS,
    ExportedLayer,
    to_lokr,
    to_lora,
    to_lycoris,
)

__all__ = ["EXPORT_KINDS", "LYCORIS_FILE", "ExportReport", "ExportedLayer", "export_adapter"]

EXPORT_KINDS = ("lora", "lokr", "gguf", "lycoris", "merged", "ndlora")
LYCORIS_FILE = "lycoris.safetensors"


@dataclass(frozen=True)
class ExportReport:
    """The files that `export_adapter` wrote.

    Attributes:
        notes: sentences on what others will not take.
        largest_rank: of a LoRA's layers; None of other forms.
        experts: whether a LoRA adapts experts, whose tensors vLLM takes in one piece only if it is told so.
    """

    directory: Path
    kind: str
    layers: tuple[ExportedLayer, ...]
    notes: tuple[str, ...]
    largest_rank: int | None = None
    experts: bool = False

    @property
    def largest_error(self) -> float:
        """The largest relative error of a layer."""
        return max(layer.error for layer in self.layers)

    @property
    def server_flags(self) -> str | None:
        """The flags that vLLM is started with to serve it; None if it cannot."""
        largest = self.largest_rank
        if self.kind != "lora" or largest is None:
            return None
        rank = next((each for each in VLLM_RANKS if each >= largest), None)
        if rank is None:
            return None
        if self.experts:
            module = json.dumps({"name": "NAME", "path": str(self.directory), "is_3d_lora_weight": True})
            return f"--enable-lora --max-lora-rank {rank} --enable-mixed-moe-lora-format --lora-modules '{module}'"
        return f"--enable-lora --max-lora-rank {rank} --lora-modules NAME={self.directory}"


def export_adapter(
    adapter: str | Path,
    output: str | Path,
    to: str = "lora",
    *,
    base: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    nested: bool = False,
    dtype: torch.dtype | None = None,
    any_size: bool = False,
    self_test: bool | Sequence[str] = False,
    trust_remote_code: bool = False,
) -> ExportReport:
    """Write an NDLORA adapter as a stock PEFT adapter, or merged into its base model.

    Args:
        adapter: directory of the adapter, or its name on the hub.
        output: a directory that does not exist yet, or an empty one; it appears when it is whole.
        to: "lora": exact for most methods, else the best of a chosen rank; "gguf": that LoRA for llama.cpp; "lokr":
            exact for ndlinear with one term of two modes; "lycoris": that LoKr for image tools; "merged": the base
            model's files, shard by shard; "ndlora": the first `rank` units of every layer, of nested ranks.
        base: directory or hub name of the base model; needed where the start is read from its weights and for
            "gguf" and "merged", if the adapter's own configuration names none that is on this machine.
        rank, energy, max_error: how LoRA's rank is chosen, layer by layer; see `RankTarget`.
        nested: that `rank` counts the adapter's first rank units, as to="ndlora" does, not singular vectors.
        dtype: of the written adapter; the file's own by default.
        any_size: also write a LoRA that is larger than the layers' weights, or of a rank that vLLM does not serve.
        self_test: whether `ndlora verify`'s self-test is written beside it, or its prompts; loads the base model.

    Raises:
        NdLoraValueError: it cannot be done.
        OSError: a file cannot be read or written; the error names it. Nothing is left behind in either case.
    """
    if to not in EXPORT_KINDS:
        raise NdLoraValueError(f"to={to!r}: choose one of {list(EXPORT_KINDS)}.")
    given = {"rank": rank, "energy": energy, "max_error": max_error}
    target = RankTarget(**given) if any(value is not None for value in given.values()) else None
    if nested or to == "ndlora":
        if self_test:
            raise NdLoraValueError(
                "A self-test is of the whole adapter, and nested and to='ndlora' cut it: export to='ndlora' first, and "
                "what that writes with self_test (--self-test)."
            )
        return _export_first_units(
            adapter, output, to, rank, target, dtype, base, trust_remote_code, any_size
        )
    if to not in ("lora", "gguf") and target is not None:
        raise NdLoraValueError(
            f"rank, energy and max_error choose LoRA's rank; to={to!r} has none: leave them out."
        )
    if to == "merged" and dtype is not None:
        raise NdLoraValueError("to='merged' keeps the dtypes of the base model: leave dtype out.")
    check_new(output)
    reader = AdapterReader(adapter)
    files, name = None, base or reader.config.base_model_name_or_path
    if self_test and not name:
        raise NdLoraValueError(
            f"{reader.directory} does not say which model it was trained on: name it (--base)."
        )
    if to in ("merged", "gguf") or reader.reads_base or base is not None:
        files = reader.open_base(base, trust_remote_code)
    check_sound(reader, files)
    probes, largest_rank, experts = (), None, False
    if self_test and name:
        prompts = PROMPTS if self_test is True else self_test
        probes = make_self_test(reader.directory, name, prompts, trust_remote_code=trust_remote_code)
    with new_directory(output) as directory:
        if probes:
            write_self_test(probes, directory)
        if to == "merged":
            assert files is not None, "opened above"
            merged = merge_files(reader, files, directory)
            layers = tuple(
                ExportedLayer(layer.name, "merged", layer.parameters, layer.lost) for layer in merged
            )
            notes: tuple[str, ...] = ()
        else:
            if to in ("lokr", "lycoris"):
                stock = to_lokr(reader, files, dtype)
            else:
                stock = to_lora(reader, files, target, dtype, any_size=any_size)
            layers, notes, largest_rank = stock.layers, (), stock.config.r
            experts = bool(getattr(stock.config, "target_parameters", None))
            if to == "gguf":
                assert files is not None, "opened above"
                write_gguf(stock, files, directory / GGUF_FILE)
            elif to == "lycoris":
                save_tensors(to_lycoris(stock), directory / LYCORIS_FILE)
            else:
                notes = _notes(stock.config, reader)
                stock.config.save_pretrained(str(directory))
                save_tensors(stock.tensors, directory / ADAPTER_FILE)
    for note in notes:
        warnings.warn(note, NdLoraWarning, stacklevel=2)
    return ExportReport(Path(output), to, layers, notes, largest_rank, experts)


def _export_first_units(
    adapter: str | Path,
    output: str | Path,
    to: str,
    rank: int | None,
    target: RankTarget | None,
    dtype: torch.dtype | None,
    base: str | None,
    trust_remote_code: bool,
    any_size: bool,
) -> ExportReport:
    if to not in ("ndlora", "lora"):
        raise NdLoraValueError(f"nested cuts to='ndlora' or 'lora': got to={to!r}.")
    if rank is None or target is None or target.rank is None:
        raise NdLoraValueError(
            f"to={to!r} of nested ranks keeps the first units: give rank, the number of them."
        )
    if to == "ndlora" and dtype is not None:
        raise NdLoraValueError("to='ndlora' keeps the adapter's dtype: leave dtype out.")
    more = {"base": base, "trust_remote_code": trust_remote_code}
    if to == "ndlora":
        found = cut_adapter(adapter, output, rank, **more)
        layers = tuple(
            ExportedLayer(layer.name, f"rank {layer.rank}", layer.parameters, layer.error)
            for layer in found.layers
        )
        return ExportReport(Path(output), to, layers, ())
    check_new(output)
    with tempfile.TemporaryDirectory() as scratch:
        cut = cut_adapter(adapter, Path(scratch, "cut"), rank, **more)
        found = export_adapter(Path(scratch, "cut"), output, to, dtype=dtype, any_size=any_size, **more)
    lost = {layer.name: layer.error for layer in cut.layers}
    layers = tuple(replace(layer, error=max(layer.error, lost[layer.name])) for layer in found.layers)
    return replace(found, layers=layers)


def _notes(config: LoraConfig | LoKrConfig, reader: AdapterReader) -> tuple[str, ...]:
    bias = getattr(config, "bias", "none")
    carried = {
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": getattr(config, "trainable_token_indices", None),
        "bias": None if bias == "none" else bias,
    }
    notes = [
        f"{field}={value!r} is in the exported adapter and PEFT loads it; servers such as vLLM refuse it "
        f"or leave it out. For those, export to='merged'."
        for field, value in carried.items()
        if value
    ]
    kinds = {form.kind for _, form in reader.forms.values() if form is not None} - {"linear", "parameter"}
    if kinds:
        notes.append(
            f"vLLM serves linear layers and experts alone; of this adapter's layers some are of kind "
            f"{', '.join(sorted(kinds))}. For vLLM, export to='merged'."
        )
    if reader.others and not any(carried.values()):
        notes.append(
            f"The exported adapter carries {', '.join(sorted(reader.others))}, as the adapter did: an "
            f"embedding that was resized or adapted. Servers may not take it; for those, export to='merged'."
        )
    return tuple(notes)
