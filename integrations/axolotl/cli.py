"""`axolotl ndlora-plan CONFIG.yml`: the budget before anything is trained.

Axolotl finds it by the entry-point group `axolotl.cli_commands`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

__all__ = ["ndlora_plan", "plan_yaml"]


def plan_yaml(config: Path, model: str | None = None, lora_rank: int = 8) -> tuple[Any, Any]:
    """Plan what a YAML describes. The model is built without weights.

    Args:
        config: an Axolotl configuration with `adapter: ndlora`.
        model: directory or hub name whose config.json is read instead of `base_model`'s.
        lora_rank: of the plain LoRA to compare with.

    Returns:
        (the NdLoraConfig, the Budget).

    Raises:
        NdLoraValueError: the YAML is for another adapter, a key cannot apply, or no layer matches.
        ValueError: Axolotl refuses the YAML.
    """
    import yaml
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from ndlora_plugins.budget import make_budget
    from ndlora_plugins.errors import NdLoraValueError

    from ..peft.skeleton import model_on_meta
    from ..peft.tuner.targets import plan_model
    from .implicit import bring_in_plugin
    from .keys import build_config

    written = DictDefault(yaml.safe_load(Path(config).read_text(encoding="utf-8")))
    if written.adapter != "ndlora":
        raise NdLoraValueError(f"{config} has adapter: {written.adapter}; ndlora-plan plans adapter: ndlora.")
    bring_in_plugin(written)
    cfg = validate_config(written)
    options = {"trust_remote_code": bool(cfg.trust_remote_code), "revision": cfg.revision_of_model}
    model_config = AutoConfig.from_pretrained(model or cfg.base_model_config or cfg.base_model, **options)
    maker = AutoModelForSequenceClassification if cfg.reward_model else None
    network = model_on_meta(model_config, auto_class=maker, trust_remote_code=options["trust_remote_code"])
    adapter = build_config(cfg, network)
    layers = plan_model(network, adapter)
    if not layers:
        raise NdLoraValueError(
            f"lora_target_modules: {cfg.lora_target_modules} matches no layer of {cfg.base_model}. Leave it "
            f"out to adapt every linear layer."
        )
    return adapter, make_budget(layers, lora_rank)


@click.command("ndlora-plan")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", help="Read the config.json of this directory or hub model instead of base_model's.")
@click.option("--lora-rank", default=8, show_default=True, help="The rank of plain LoRA to compare with.")
def ndlora_plan(config: Path, model: str | None, lora_rank: int) -> None:
    """show what `adapter: ndlora` would cost, layer by layer, before anything is trained"""
    from rich.console import Console
    from rich.table import Table

    try:
        adapter, budget = plan_yaml(config, model, lora_rank)
    except (ValueError, OSError) as error:  # ours and pydantic's are ValueErrors
        raise click.ClickException(str(error)) from error
    header, rows = budget.table()
    table = Table(*header, title=f"{adapter.method} r={adapter.r}: {config}", title_justify="left")
    for row in rows:
        table.add_row(*row)
    # a table that is piped into a file is not folded at 80 columns
    console = Console(width=None if Console().is_terminal else 160)
    console.print(table)
    console.print(budget.summary)
