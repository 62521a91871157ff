"""`axolotl merge-lora` for our adapter: one shard of the base model at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.utils.logging import get_logger

from ..peft.exports.merge import merge_files
from ..peft.files.adapter import AdapterReader
from ..peft.files.base import BaseFiles, NotInFilesError
from ..peft.files.directories import new_directory
from ..peft.files.problems import check_sound

__all__ = ["merge_and_save", "merge_by_shard"]

LOG = get_logger("axolotl.plugins.ndlora")


def merge_and_save(cfg: Any) -> bool:
    """Write the merged model and its tokenizer where `axolotl merge-lora` does.

    Returns:
        False where only the loaded model can be merged: `cfg` asks for that now, and nothing was written.
    """
    from axolotl.loaders import load_tokenizer

    output = Path(cfg.output_dir) / "merged"
    try:
        count = merge_by_shard(
            cfg.base_model,
            cfg.lora_model_dir,
            output,
            revision=cfg.revision_of_model,
            trust_remote_code=bool(cfg.trust_remote_code),
        )
    except NotInFilesError as reason:
        LOG.warning("%s Merging on the loaded model instead (merge_method: legacy).", reason)
        cfg.merge_method = "legacy"
        return False
    load_tokenizer(cfg).save_pretrained(str(output), save_jinja_files=cfg.tokenizer_save_jinja_files)
    LOG.info("ndlora: merged %s layers into %s", count, output)
    return True


def merge_by_shard(
    base: str, adapter: str, output: Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> int:
    """Write the merged model to `output`, over an earlier one; returns how many layers were merged.

    Raises:
        NotInFilesError: the loaded model can be merged. Nothing was written.
        NdLoraValueError: the adapter is of another kind, broken, or of another base model.
    """
    reader = AdapterReader(adapter)
    files = BaseFiles.open(base, revision=revision, trust_remote_code=trust_remote_code)
    reader.check_base(files)
    check_sound(reader, files)
    with new_directory(output, replace=_holds_weights) as directory:
        merged = merge_files(reader, files, directory)
    return len(merged)


def _holds_weights(path: Path) -> bool:
    """Whether transformers might load it in place of the new weights: an earlier merge had other shards."""
    return path.suffix in {".safetensors", ".bin"} or path.name.endswith(".index.json")
