"""What comes out where processes are killed, disks are full, and two do the same: `make chaos`, minutes, by hand.

    python tests/chaos tests/chaos/results.json [--seed 0] [--trainings 24] [--exports 40] ...

Trainings and exports of tiny models run in processes of their own, on the real code: the trainers as a user calls
them, and the command `ndlora export`. Every moment is drawn at random. The results are the table of
docs/reliability.md. Exit status 1 if anything came out otherwise than it should.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from trials import Chaos

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="where the figures go, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trainings", type=int, default=24)
    parser.add_argument("--exports", type=int, default=40, help="for each signal")
    parser.add_argument("--full-disks", type=int, default=20)
    parser.add_argument("--races", type=int, default=20)
    options = parser.parse_args()
    started = time.perf_counter()
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    chaos = Chaos(directory, options.seed)
    rows = []
    for trial, *arguments in (
        (chaos.trainings, options.trainings),
        (chaos.exports, options.exports, signal.SIGKILL),
        (chaos.exports, options.exports, signal.SIGTERM),
        (chaos.full_disks, options.full_disks),
        (chaos.races, options.races),
    ):
        row = trial(*arguments)
        rows.append({**vars(row), "outcomes": dict(row.outcomes)})
        print(
            f"{row.times} {row.tried}",
            *(f"{count:6d} {what}" for what, count in row.outcomes.items()),
            sep="\n",
        )
        print(*(f"FAILED {failure}" for failure in row.failures), sep="\n", flush=True)
    packages = ("torch", "safetensors", "peft", "transformers", "trl")
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "seed": options.seed,
        "seconds": round(time.perf_counter() - started),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "rows": rows,
    }
    options.results.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if any(row["failures"] for row in rows):
        sys.exit(f"Something came out otherwise than it should; what was left is in {directory}.")
    shutil.rmtree(directory)


if __name__ == "__main__":
    main()
