"""README and docs say what is true: their snippets run here, their tables are made here.

`python tests/test_docs.py` writes the generated parts anew.
"""

import importlib
import json
import pathlib
import re
import statistics
import sys
import types
from dataclasses import MISSING, fields

import pytest
import torch
from peft import get_peft_model

from ndlora_plugins import NdLoraConfig, register_plugin, unregister_plugin
from ndlora_plugins.commands.methods import describe_schedules
from ndlora_plugins.registry import methods
from ndlora_plugins.testing import check_method

ROOT = pathlib.Path(__file__).resolve().parent.parent
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HOSTS = ("torch", "peft", "transformers", "trl", "axolotl")
# module of docs/development.md -> its block, its method, a factor that trains
PAGE_METHODS = {"lora_xs": (0, "my_lora_xs", "core"), "diagonal": (2, "diagonal", "scale")}
# module -> what users import from it
PUBLIC = {
    "ndlora_plugins": [
        "NdLoraConfig",
        "measure_gradients",
        "hookimpl",
        "register_plugin",
        "unregister_plugin",
    ],
    "ndlora_plugins.methods": ["Method"],
    "ndlora_plugins.starts": ["Start"],
    "ndlora_plugins.structures": ["Chain", "Einsum", "Factor", "KroneckerSum", "Layout", "Structure"],
    "ndlora_plugins.testing": ["check_method"],
}


def read(path):
    return (ROOT / path).read_text()


def blocks(path, language):
    """The fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", read(path), re.DOTALL)


def options_page():
    inherited = {
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    }
    lines = [
        "# Options of `NdLoraConfig`",
        "",
        "Generated from the fields' own text by `python tests/test_docs.py`.",
        "",
        "| option | default | meaning |",
        "|---|---|---|",
    ]
    for field in fields(NdLoraConfig):
        if field.name not in inherited:
            default = {} if field.default is MISSING else field.default
            lines.append(f"| `{field.name}` | `{default!r}` | {field.metadata['help']} |")
    lines += ["", "The rest is as in every `PeftConfig`: `task_type`, `inference_mode`, `revision`, ...", ""]
    return "\n".join([*lines, *methods_options()])


def methods_options():
    lines = [
        "## Options of the methods",
        "",
        "`NdLoraConfig(options={...})`, in YAMLs `options:`. `num_modes`, `crossed_modes` and `modes` above give them "
        "too; [einsum.md](einsum.md) says what einsum's mean. A method that is not here has none.",
        "",
        "| method | options and their defaults |",
        "|---|---|",
    ]
    for name, found in methods().items():
        options = [
            f"`{field.name}`" if field.default is MISSING else f"`{field.name}={field.default!r}`"
            for field in fields(found.value.Options)
        ]
        if options and found.plugin == "ndlora-plugins":
            lines.append(f"| `{name}` | {', '.join(options)} |")
    return [*lines, ""]


def requirements(name):
    """The lines of a file of environments/, without comments of their own."""
    lines = (ROOT / "environments" / f"{name}.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def versions_table():
    lines = [f"| environment | {' | '.join(HOSTS)} |", f"|---|{'---|' * len(HOSTS)}"]
    for name in ("newest", "axolotl"):
        lock = dict(line.split("==") for line in requirements(name))
        lines.append(f"| `{name}` | {' | '.join(lock.get(host, '') for host in HOSTS)} |")
    held_back = [line.partition("  # ") for line in requirements("held-back")]
    lines += ["", *(f"Held back to `{wanted}`: {reason}." for wanted, _, reason in held_back)]
    return "\n".join(lines) + "\n"


def with_part(path, name, text, page=None):
    """A page with its generated part of that name written anew."""
    part = re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- end -->)", re.DOTALL)
    return part.sub(lambda found: found[1] + text + found[2], page or read(path))


def chaos_table():
    """What `make chaos` found."""
    report = json.loads((ROOT / "tests" / "chaos" / "results.json").read_text())
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = ["| what was tried | how often | what came out |", "|---|---:|---|"]
    for row in report["rows"]:
        found = "<br>".join(f"{count} {outcome}" for outcome, count in row["outcomes"].items())
        lines.append(f"| {row['tried']} | {row['times']} | {found} |")
    wrong = sum(len(row["failures"]) for row in report["rows"])
    lines += ["", f"Came out otherwise than it should: {wrong}. {report['date']}, {versions}."]
    return "\n".join(lines) + "\n"


def served():
    """What `python -m benchmarks.serving` found: name of a part of docs/serving.md -> its text."""
    reports = [
        json.loads((ROOT / "benchmarks" / "serving" / "results" / f"{server}.json").read_text())
        for server in ("vllm", "llamacpp")
    ]
    adapters = [
        "| server | method | verdict | equal | off | apart | loaded |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    others = ["| server | asked for | what `verify` says |", "|---|---|---|"]
    versions = []
    for report in reports:
        server, rows = report["server"], report["adapters"]
        for row in rows:
            cells = [
                server,
                f"`{row['method']}`",
                row["serves"],
                f"{row['equal_answers']} of {row['prompts']}",
            ]
            cells += [f"{row['to_adapter']:.3f}", f"{row['between']:.3f}", row["loaded"]]
            adapters.append(f"| {' | '.join(cells)} |")
        for case, row in report["others"].items():
            said = row["said"].replace("\n", " ").replace("|", "\\|")
            others.append(f"| {server} | {case} | {said} |")
        packages = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        seconds = [statistics.median(row[f"{step}_seconds"] for row in rows) for step in ("export", "verify")]
        took = "export with its self-test {:.0f} s, the start {:.0f} s, verify {:.0f} s".format(
            seconds[0], report["start_seconds"], seconds[1]
        )
        versions += ["", f"{server}: {packages}; on two CPU cores {took}."]
    return {"served": "\n".join([*adapters, *versions, ""]), "not served": "\n".join([*others, ""])}


def serving_page():
    page = read("docs/serving.md")
    for name, text in served().items():
        page = with_part("docs/serving.md", name, text, page)
    return page


def schedules_table():
    """The registered schedules of our own."""
    lines = ["| schedule | what it does | options | source |", "|---|---|---|---|"]
    for row in describe_schedules():
        if row["plugin"] == "ndlora-plugins":
            options = ", ".join(f"`{option}`" for option in row["options"])
            lines.append(f"| `{row['schedule']}` | {row['what it does']} | {options} | {row['source']} |")
    return "\n".join(lines) + "\n"


def test_the_schedules_table():
    assert (ROOT / "docs" / "schedules.md").read_text() == with_part(
        "docs/schedules.md", "schedules", schedules_table()
    )


@pytest.mark.parametrize("path", ["README.md", "docs/support.md"])
def test_the_table_of_versions(path):
    assert versions_table() in read(path) and read(path) == with_part(path, "versions", versions_table())


def test_the_tables_of_the_serving_page():
    assert read("docs/serving.md") == serving_page()


def test_the_options_page():
    assert (ROOT / "docs" / "options.md").read_text() == options_page()


def test_the_table_of_the_reliability_page():
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert chaos_table() in page and page == with_part("docs/reliability.md", "chaos", chaos_table())


@pytest.fixture
def tiny_hub(tmp_path, monkeypatch, save_tiny_model):
    """A directory with a tiny model and tokenizer that takes the hub model's place."""
    monkeypatch.chdir(tmp_path)  # where the snippets write
    save_tiny_model(tmp_path / "hub", ["Two and two is four."])
    return str(tmp_path / "hub")


def run_snippet(code, tiny_hub):
    assert HUB_MODEL in code
    exec(compile(code.replace(HUB_MODEL, tiny_hub), "README.md", "exec"), {"__name__": "snippet"})


def test_the_peft_snippet(tiny_hub):
    run_snippet(blocks("README.md", "python")[0], tiny_hub)


@pytest.mark.slow
def test_the_trl_snippet(tiny_hub):
    pytest.importorskip("trl")
    run_snippet(blocks("README.md", "python")[1], tiny_hub)


@pytest.mark.slow
def test_the_snippet_of_the_page_on_reinforcement(tiny_hub):
    pytest.importorskip("trl")
    run_snippet(blocks("docs/rl.md", "python")[0], tiny_hub)


def test_the_snippet_of_the_page_on_quantised_bases(tiny_hub):
    pytest.importorskip("bitsandbytes")
    run_snippet(blocks("docs/quantised.md", "python")[0], tiny_hub)


@pytest.mark.slow
def test_the_snippet_of_the_trl_page(tiny_hub):
    pytest.importorskip("trl")
    from datasets import Dataset

    code = blocks("docs/trl.md", "python")[0].replace("Qwen/Qwen3-1.7B", tiny_hub).replace("r=128", "r=4")
    on_a_cpu = code.replace(
        "learning_rate=1e-3", 'learning_rate=1e-3, bf16=False, report_to="none", max_steps=1'
    )
    exec(compile(on_a_cpu, "trl.md", "exec"), {"dataset": Dataset.from_list([{"text": "Two and two"}] * 8)})


def test_the_snippet_of_the_export_page(make_llama, shake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shake(get_peft_model(make_llama(), NdLoraConfig())).save_pretrained("my-adapter")
    exec(compile(blocks("docs/export.md", "python")[0], "export.md", "exec"), {})


@pytest.fixture
def page_module(request):
    """A block of the development page as a module, which is no plugin any more when the test ends."""
    module, code = types.ModuleType(request.param), blocks("docs/development.md", "python")
    exec(compile(code[PAGE_METHODS[request.param][0]], "development.md", "exec"), vars(module))
    yield module
    unregister_plugin(module)


@pytest.mark.parametrize("page_module", PAGE_METHODS, indirect=True)
def test_the_method_of_the_development_page_trains(page_module):
    _, method, factor = PAGE_METHODS[page_module.__name__]
    register_plugin(page_module)
    check_method(method)
    layer = torch.nn.Sequential(torch.nn.Linear(8, 8))
    model = get_peft_model(layer, NdLoraConfig(method=method, r=2, target_modules=["0"]))
    model(torch.ones(2, 8)).sum().backward()
    assert model.base_model.model[0].ndlora_factors["default"][factor].grad.abs().sum() > 0


@pytest.mark.parametrize("page_module", ["lora_xs"], indirect=True)
def test_the_development_page_shows_how_a_method_is_checked(page_module, monkeypatch):
    monkeypatch.setitem(sys.modules, "lora_xs", page_module)
    exec(compile(blocks("docs/development.md", "python")[1], "development.md", "exec"), {})


def test_the_snippet_of_the_einsum_page(tiny_hub):
    run_snippet(blocks("docs/einsum.md", "python")[0], tiny_hub)


@pytest.mark.parametrize("equation", re.findall(r"^\| `(.* -> .*?)`", read("docs/einsum.md"), re.MULTILINE))
def test_an_equation_of_the_einsum_page_holds_to_the_laws(equation):
    check_method("einsum", options={"equation": equation})


def test_the_yaml_of_the_einsum_page(tiny_hub, tmp_path):
    pytest.importorskip("axolotl")
    loaded = load_yaml(blocks("docs/einsum.md", "yaml")[0], tiny_hub, tmp_path)
    assert loaded.ndlora.method == "einsum" and loaded.ndlora.options["sizes"] == {"s": 16}


def test_what_a_user_imports():
    for module, names in PUBLIC.items():
        assert [name for name in names if not hasattr(importlib.import_module(module), name)] == []


def load_yaml(text, tiny_hub, tmp_path):
    """As `axolotl train` reads and checks it, on a CPU, with data and what else a training needs."""
    import yaml
    from axolotl.cli.config import load_cfg

    (tmp_path / "data.jsonl").write_text('{"instruction": "Two and two", "input": "", "output": "four"}\n')
    least = {
        "datasets": [{"path": "data.jsonl", "type": "alpaca"}],
        "micro_batch_size": 1,
        "learning_rate": 1e-3,
    }
    config = {**least, **yaml.safe_load(text.replace(HUB_MODEL, tiny_hub)), "bf16": False, "sequence_len": 64}
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    return load_cfg(str(tmp_path / "config.yml"))


def test_the_axolotl_snippet(tiny_hub, tmp_path):
    pytest.importorskip("axolotl")
    loaded = load_yaml(blocks("README.md", "yaml")[0], tiny_hub, tmp_path)
    assert loaded.adapter == "ndlora" and loaded.lora_target_linear


if __name__ == "__main__":
    for path in ("README.md", "docs/support.md"):
        (ROOT / path).write_text(with_part(path, "versions", versions_table()))
    (ROOT / "docs" / "serving.md").write_text(serving_page())
    (ROOT / "docs" / "options.md").write_text(options_page())
    (ROOT / "docs" / "schedules.md").write_text(
        with_part("docs/schedules.md", "schedules", schedules_table())
    )
    (ROOT / "docs" / "reliability.md").write_text(with_part("docs/reliability.md", "chaos", chaos_table()))
