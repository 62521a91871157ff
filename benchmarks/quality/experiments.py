"""Folders for PEFT's method_comparison: `python -m benchmarks.quality.experiments` writes those of the table below.

A folder goes into PEFT's `method_comparison/TASK/experiments/ndlora/`; `make` there runs it. None was run here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["EXPERIMENTS", "FOLDER", "MODELS", "file_texts"]

FOLDER = Path(__file__).parent / "method_comparison"

# the layers that PEFT's own LoRA and LoKr have there
_FLUX_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
                "to_qkv_mlp_proj", "linear_in", "linear_out"]  # fmt: skip
_ALL_LINEAR = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
_FLUX = {"target_modules": _FLUX_LAYERS}
_CROSSED, _EVEN = {"method": "crossed", "crossed_modes": 4}, {"method": "ndlinear"}
_THREE = {**_CROSSED, "num_modes": 3}
# PEFT's LoKr has this rate there, the rest the default
_FLUX_RATE, _LLAMA_RATE = {"lr": 1e-3, "weight_decay": 1e-4}, {"lr": 3e-4, "weight_decay": 0.1}

# task -> folder's name -> what its configuration says, what the optimizer has
EXPERIMENTS: dict[str, dict[str, tuple[dict[str, Any], dict[str, float]]]] = {
    "image-gen": {
        "flux2-klein-crossed8-3modes-lr_0.001": ({**_FLUX, **_THREE, "crossed_modes": 8}, _FLUX_RATE),
        "flux2-klein-crossed4-3modes-lr_0.001": ({**_FLUX, **_THREE}, _FLUX_RATE),
        "flux2-klein-crossed4-3modes-2terms-lr_0.001": ({**_FLUX, **_THREE, "r": 2}, _FLUX_RATE),
        "flux2-klein-ndlinear-lr_0.001": ({**_FLUX, **_EVEN}, _FLUX_RATE),
        "flux2-klein-crossed4-lr_0.001": ({**_FLUX, **_CROSSED}, _FLUX_RATE),
        "flux2-klein-crossed4-3modes-4terms-lr_0.001": ({**_FLUX, **_THREE, "r": 4}, _FLUX_RATE),
    },
    "MetaMathQA": {
        "llama-3.2-3B-all-linear-crossed4-3modes-2terms-lr_0.0003": ({**_ALL_LINEAR, **_THREE, "r": 2}, _LLAMA_RATE),
        "llama-3.2-3B-all-linear-ndlinear-lr_0.0003": ({**_ALL_LINEAR, **_EVEN}, _LLAMA_RATE),
        "llama-3.2-3B-all-linear-crossed4-lr_0.0003": ({**_ALL_LINEAR, **_CROSSED}, _LLAMA_RATE),
    },
}  # fmt: skip


def _flux2_klein_4b() -> nn.Module:
    from diffusers import Flux2Transformer2DModel

    sizes = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "attention_head_dim": 128}
    return Flux2Transformer2DModel(**sizes, in_channels=128, joint_attention_dim=7680, mlp_ratio=3.0)


def _llama_3_2_3b() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=128256))


# task -> the shapes of its model, for planning on "meta"
MODELS = {"image-gen": _flux2_klein_4b, "MetaMathQA": _llama_3_2_3b}


def file_texts(task: str, name: str) -> dict[str, str]:
    """File name -> text of one folder."""
    fields, optimizer = EXPERIMENTS[task][name]
    return {
        "adapter_config.json": json.dumps({"peft_type": "NDLORA", **fields}, indent=2) + "\n",
        "training_params.json": json.dumps({"optimizer_kwargs": optimizer}, indent=2) + "\n",
    }


def main() -> None:
    """Write every folder of the table."""
    for task, experiments in EXPERIMENTS.items():
        for name in experiments:
            folder = FOLDER / task / "experiments" / "ndlora" / name
            folder.mkdir(parents=True, exist_ok=True)
            for file, text in file_texts(task, name).items():
                (folder / file).write_text(text)


if __name__ == "__main__":
    main()
