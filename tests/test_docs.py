"""README and docs say what is true: their snippets run here, their tables are made here.

`python tests/test_docs.py` writes the generated parts anew.
"""

import json
import pathlib
import re
from dataclasses import MISSING, fields

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
HOSTS = ("torch", "peft", "transformers", "trl", "axolotl")


def blocks(path, language):
    """The fenced blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)


def methods_table():
    from ndlora_plugins.registry import methods

    lines = ["| `method` | what it is | default `r` | source |", "|---|---|---|---|"]
    for name, found in methods().items():
        method = found.value
        if found.plugin == "ndlora-plugins":
            lines.append(f"| `{name}` | {method.summary} | {method.default_rank} | {method.source} |")
    return "\n".join(lines) + "\n"


def options_page():
    from ndlora_plugins import NdLoraConfig

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
    return "\n".join(lines)


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


def with_part(path, name, text):
    """A page with its generated part of that name written anew."""
    part = re.compile(rf"(<!-- {name}: .*? -->\n).*?(<!-- end -->)", re.DOTALL)
    return part.sub(lambda found: found[1] + text + found[2], (ROOT / path).read_text())


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


def test_the_methods_table():
    assert (ROOT / "README.md").read_text() == with_part("README.md", "methods", methods_table())


def test_the_table_of_versions():
    page = (ROOT / "docs" / "support.md").read_text()
    assert versions_table() in page and page == with_part("docs/support.md", "versions", versions_table())


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
    on_a_cpu = (
        'report_to="none", bf16=False'  # TRL's default is bf16=True, which transformers refuses on a CPU
    )
    run_snippet(blocks("README.md", "python")[1].replace('report_to="none"', on_a_cpu), tiny_hub)


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
    from peft import get_peft_model

    from ndlora_plugins import NdLoraConfig

    monkeypatch.chdir(tmp_path)
    shake(get_peft_model(make_llama(), NdLoraConfig())).save_pretrained("my-adapter")
    exec(compile(blocks("docs/export.md", "python")[0], "export.md", "exec"), {})


def test_the_method_of_the_development_page_trains():
    import torch
    from peft import get_peft_model

    from ndlora_plugins import NdLoraConfig, register_plugin, unregister_plugin

    namespace = {"__name__": "diagonal"}
    exec(compile(blocks("docs/development.md", "python")[0], "development.md", "exec"), namespace)
    plugin = type("Plugin", (), {})()
    plugin.ndlora_methods, plugin.ndlora_starts = namespace["ndlora_methods"], namespace["ndlora_starts"]
    register_plugin(plugin)
    try:
        model = get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(8, 8)), NdLoraConfig(method="diagonal", target_modules=["0"])
        )
        model(torch.ones(2, 8)).sum().backward()
        assert model.base_model.model[0].ndlora_factors["default"]["scale"].grad.abs().sum() > 0
    finally:
        unregister_plugin(plugin)


def test_the_axolotl_snippet(tiny_hub, tmp_path):
    pytest.importorskip("axolotl")
    import yaml
    from axolotl.cli.config import load_cfg

    config = yaml.safe_load(blocks("README.md", "yaml")[0].replace(HUB_MODEL, tiny_hub))
    (tmp_path / "data.jsonl").write_text('{"instruction": "Two and two", "input": "", "output": "four"}\n')
    on_a_cpu = {"bf16": False, "sequence_len": 64}
    (tmp_path / "config.yml").write_text(yaml.safe_dump({**config, **on_a_cpu}))
    loaded = load_cfg(str(tmp_path / "config.yml"))
    assert loaded.adapter == "ndlora" and loaded.ndlora.method == "slora" and loaded.lora_r == 8


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_part("README.md", "methods", methods_table()))
    (ROOT / "docs" / "support.md").write_text(with_part("docs/support.md", "versions", versions_table()))
    (ROOT / "docs" / "options.md").write_text(options_page())
    (ROOT / "docs" / "reliability.md").write_text(with_part("docs/reliability.md", "chaos", chaos_table()))
