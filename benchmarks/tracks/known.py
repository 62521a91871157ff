"""The small table that ships with the package: what `ndlora plan --parameters` knows of each method.

`python -m benchmarks.tracks.report` writes it, from the tracks and from the language model of benchmarks/quality.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality import report as quality
from benchmarks.runs import read_results
from benchmarks.tracks.rows import BASELINE, NOTHING, rows
from ndlora_plugins import NdLoraConfig

__all__ = ["FILE", "known"]

FILE = Path(__file__).parents[2] / "integrations" / "peft" / "evidence.json"


def known(tracks: Mapping[str, Sequence[dict[str, Any]]], language: Path) -> dict[str, Any]:
    """Families of options without their rank, with what each track measured.

    A point has the rank, the size as a part of LoRA r=8's, the share of LoRA r=8's gain over the head alone (for the
    language model, over the model as it was), and the best rate as a multiple of LoRA r=8's.

    Args:
        tracks: results by track.
        language: results of benchmarks/quality.
    """
    families: dict[str, dict[str, Any]] = {}
    points = [
        *_of_language(language),
        *(each for name, some in tracks.items() for each in _of_track(name, some)),
    ]
    for options, point in points:
        if "components" in options:  # sizes by hand for each layer of that model
            continue
        config = NdLoraConfig(**options)
        if "gradient" in config.resolved().start.reads:  # needs more than a configuration
            continue
        default = NdLoraConfig(method=config.method, r=config.r, options=config.options)
        options = {
            "method": config.method,
            **{n: v for n, v in options.items() if n == "options" or v != getattr(default, n)},
        }
        family = families.setdefault(json.dumps(options, sort_keys=True), {"options": options, "points": []})
        family["points"].append({"r": config.r, **point})
    wanted = set(tracks)
    return {
        "tracks": sorted({point["track"] for _, point in points}),
        "families": [f for f in families.values() if wanted <= {point["track"] for point in f["points"]}],
    }


def _of_track(
    name: str, results: Sequence[dict[str, Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    found = {row.setting: row for row in rows(results)}
    baseline, nothing = found.get(BASELINE), found.get(NOTHING)
    for row in found.values():
        if row.ours:
            kept = (nothing.loss - row.loss) / (nothing.loss - baseline.loss)
            yield row.options, _point(name, row, baseline, kept)


def _of_language(file: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    found = {row.setting: row for row in quality.rows(read_results(file))}
    baseline = found[quality.BASELINE]
    for row in found.values():
        if row.ours:  # on the problems that were followed, where the loss before the training is known
            gains = [one.curve[0][1] - one.curve[-1][1] for one in (row, baseline)]
            options = row.options
            if options.get("crossed_modes") == 4:  # the default method's own
                options = {**options, "method": NdLoraConfig().method}
            yield options, _point("language", row, baseline, gains[0] / gains[1])


def _point(track: str, row: Any, baseline: Any, kept: float) -> dict[str, Any]:
    return {
        "track": track,
        "fraction": round(row.parameters / baseline.parameters, 5),
        "kept": round(kept, 3),
        "rate": round(row.learning_rate / baseline.learning_rate, 3),
    }
