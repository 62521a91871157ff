"""The tables of docs/trl.md, docs/axolotl.md and docs/hosts.md: what was run with which method, by the tests' marks.

A cell stands for a test with `@pytest.mark.step(step, host=, method=)`; host and method may also come from the test's
own parameters. `python tests/test_hosts.py` writes the tables of the hosts that are installed.
"""

import contextlib
import importlib.util
import io
import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = {"trl": "docs/trl.md", "axolotl": "docs/axolotl.md", "hosts": "docs/hosts.md"}
# page -> what its tests cannot be collected without
NEEDS = {"trl": ["trl"], "axolotl": ["axolotl"], "hosts": ["diffusers", "sentence_transformers"]}
if importlib.util.find_spec("axolotl"):  # beside it the others are tried with fewer methods
    PAGES = {"axolotl": PAGES["axolotl"]}
# of docs/hosts.md: folders of tests, and the columns
FOLDERS, COLUMNS = (
    ("diffusers", "hosts", "ms_swift"),
    ("train", "save", "load", "continue", "merge", "export"),
)
METHODS = ("crossed", "ndlinear", "slora", "nlora", "inttune", "einsum")
GENERATED = re.compile(r"(<!-- steps: .*? -->\n).*?(<!-- end -->)", re.DOTALL)


class Collector:
    """A pytest plugin that keeps what was collected."""

    def pytest_collection_finish(self, session):
        self.items = session.items


def steps(host):
    """(host, step, file) -> the methods that it was run with, in the tests' order."""
    collector = Collector()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        failed = pytest.main(["--collect-only", str(ROOT / "tests" / host)], plugins=[collector])
    if failed:
        raise RuntimeError(printed.getvalue())
    found = {}
    for item in collector.items:
        words, given = [], {}
        if hasattr(item, "callspec"):
            words, given = item.callspec.id.split("-"), item.callspec.params
        for mark in reversed([mark for mark in item.own_markers if mark.name == "step"]):
            method = mark.kwargs.get("method") or next(word for word in words if word in METHODS)
            trainer = mark.kwargs.get("host") or given.get("host", host)
            way = ", ".join(word for word in words if word not in (method, trainer))
            step = f"{mark.args[0]}: {way}" if way else mark.args[0]
            found.setdefault((trainer, step, item.path.name), set()).add(method)
    return found


def table_of_hosts():
    """A host a row, a step a column: the number of methods that were run, of those of `METHODS`."""
    rows = {}
    for folder in FOLDERS:
        for (host, step, file), methods in steps(folder).items():
            row = rows.setdefault(host, {"files": set()})
            row["files"].add(f"`{folder}/{file}`")
            for word in step.partition(":")[0].split(", "):
                row.setdefault(word, set()).update(methods)
    lines = [f"| host | {' | '.join(COLUMNS)} | test |", f"|---|{':-:|' * len(COLUMNS)}---|"]
    for host, row in rows.items():
        cells = [str(len(row[word])) if word in row else "" for word in COLUMNS]
        lines.append(f"| {host} | {' | '.join(cells)} | {', '.join(sorted(row['files']))} |")
    return "\n".join(lines) + "\n"


def table(host):
    if host == "hosts":
        return table_of_hosts()
    lines = [
        f"| {'trainer | ' if host == 'trl' else ''}step | {' | '.join(METHODS)} | test |",
        f"|{'---|' if host == 'trl' else ''}---|{':-:|' * len(METHODS)}---|",
    ]
    for (trainer, step, file), methods in sorted(steps(host).items(), key=lambda row: row[0][0]):
        cells = [trainer] if host == "trl" else []
        cells += [step, *("yes" if method in methods else "" for method in METHODS), f"`{file}`"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(host, made):
    return GENERATED.sub(lambda match: match[1] + made + match[2], (ROOT / PAGES[host]).read_text())


@pytest.fixture(scope="module")
def tables():
    """Of the hosts that are installed, collected in a process of its own."""
    command = [sys.executable, "-P", __file__, "--print"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("host", PAGES)
def test_the_table_of_what_was_run(host, tables):
    for module in NEEDS[host]:
        pytest.importorskip(module)
    assert (ROOT / PAGES[host]).read_text() == with_table(host, tables[host])


if __name__ == "__main__":
    installed = [page for page in PAGES if all(map(importlib.util.find_spec, NEEDS[page]))]
    made = {page: table(page) for page in installed}
    if sys.argv[1:]:
        print(json.dumps(made))
    else:
        for page in installed:
            (ROOT / PAGES[page]).write_text(with_table(page, made[page]))
