"""`axolotl merge-lora`: its default, memory-efficient way reads LoRA's keys only and would merge nothing.

Ours takes its place for our adapter: `integrations/peft/merge_files.py`, one shard of the base model at a time.
What it cannot do goes the "legacy" way, on the loaded model.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger

from ..patches import stand_before
from ..peft.exports.merge import merge_files
from ..peft.files.adapter import AdapterReader
from ..peft.files.base import BaseFiles, NotInFilesError
from ..peft.files.directories import new_directory
from ..peft.files.problems import check_sound

__all__ = ["enable", "merge_by_shard"]

LOG = get_logger("axolotl.plugins.ndlora")
_HOST = "axolotl.cli.merge_lora"


def enable(cfg: Any) -> None:
    """Stand before `do_merge_lora`; where Axolotl has not loaded it yet, ask for "legacy", as right."""
    module = sys.modules.get(_HOST)
    if module is None:
        cfg["merge_method"] = "legacy"
        return
    stand_before(module, "do_merge_lora", _merging_by_shard)


def _merging_by_shard(original: Callable[..., None]) -> Callable[..., None]:
    def do_merge_lora(*, cfg: Any) -> None:
        if cfg.adapter == "ndlora" and cfg.merge_method != "legacy":
            try:
                return _merge(cfg)
            except NotInFilesError as reason:
                LOG.warning("%s Merging on the loaded model instead (merge_method: legacy).", reason)
                cfg.merge_method = "legacy"
        return original(cfg=cfg)

    return do_merge_lora


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
    """Write the merged model to `output`, in place of an earlier one; returns how many layers were merged.

    Raises:
        NotInFilesError: the loaded model can be merged. Nothing was written.
        NdLoraValueError: the adapter is of another kind, broken, or of another base model.
    """
    reader = AdapterReader(adapter)
    files = BaseFiles.open(base, revision=revision, trust_remote_code=trust_remote_code)
    reader.check_base(files)
    check_sound(reader, files)
    with new_directory(output, replace=True) as directory:  # as Axolotl's own way would write over it too
        merged = merge_files(reader, files, directory)
    return len(merged)
