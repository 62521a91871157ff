"""`ndlora sft --config FILE.yaml`: TRL's YAML with `ndlora:` added."""

import json
import sys

import pytest
import yaml
from safetensors.torch import load_file

from ndlora_plugins.errors import MissingExtraError, NdLoraValueError

pytest.importorskip("trl")

# TRL's arguments, `ndlora:` -> fields of the NdLoraConfig that come of it
CONFIGS = {
    "nothing": ({}, None, {"method": "crossed", "r": 1, "task_type": "CAUSAL_LM"}),
    "a name": ({}, "inttune", {"method": "inttune", "r": 8}),
    "a mapping": ({}, {"method": "nlora", "r": 4}, {"method": "nlora", "r": 4, "lora_alpha": 16}),
    "JSON": ({}, '{"method": "slora", "r": 3}', {"method": "slora", "r": 3}),
    "TRL's keys": (
        {"lora_r": 16, "lora_alpha": 32, "lora_target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        "slora",
        {"r": 16, "lora_alpha": 32, "target_modules": {"q_proj", "v_proj"}, "use_rslora": True},
    ),
    "options of the method": (
        {},
        '{"method": "einsum", "options": {"equation": "out r, r in -> out in"}}',
        {"method": "einsum", "options": {"equation": "out r, r in -> out in"}},
    ),
    "ours first": ({"lora_r": 16}, {"method": "slora", "r": 2}, {"r": 2, "lora_alpha": 2}),
}
# TRL's arguments, `ndlora:` -> words of the error
REFUSED = {
    "unknown option": ({}, {"rank": 4}, r"unknown options \['rank'\]. Known: .*'?\br\b"),
    "a field that a save writes": ({}, {"layers": {}}, r"unknown options \['layers'\]"),
    "an option that the method does not have": (
        {},
        {"method": "slora", "options": {"size": 4}},
        r"options=\{'size': ...\}: method='slora' has no such option; it has none",
    ),
    "unknown method": ({}, "lora", "method='lora' is no known method"),
    "unknown option of the callback": (
        {},
        {"callback": {"loud": True}},
        r"ndlora.callback: unknown options \['loud'\]",
    ),
    "unknown export": ({}, {"callback": {"export": "onnx"}}, "'lora', 'lokr', 'gguf', 'lycoris', 'merged'"),
    "dora": ({"use_dora": True}, None, "use_dora=True"),
    "no adapter": ({"use_peft": False}, None, "always trains an adapter"),
    "broken JSON": ({}, "{method: slora", "no JSON object"),
    "a list": ({}, ["slora"], "a method's name or a mapping"),
    "a budget and a rank": ({"lora_r": 8}, {"parameters": "1M"}, "parameters=1M chooses what r=8 says"),
    "a budget that is none": ({}, {"parameters": "much"}, "write a number such as"),
}


@pytest.fixture
def configure(tmp_path):
    """Function from the YAML's keys and its `ndlora:` to NdLoraConfig."""
    from ndlora_plugins.integrations.trl.sft import make_config, read_run

    def of(given, ndlora):
        keys = {"output_dir": str(tmp_path / "out"), "bf16": False, **given}
        (tmp_path / "given.yaml").write_text(yaml.safe_dump(keys), encoding="utf-8")
        return make_config(read_run(["--config", str(tmp_path / "given.yaml")], "ndlora sft"), ndlora)[0]

    return of


@pytest.mark.parametrize(("given", "ndlora", "expected"), CONFIGS.values(), ids=CONFIGS)
def test_configuration(given, ndlora, expected, configure):
    config = configure(given, ndlora)
    assert {name: getattr(config, name) for name in expected} == expected


def test_a_budget_chooses_the_method(configure, tmp_path):
    from transformers import LlamaConfig

    from ndlora_plugins.commands.plan import plan_from_model_config

    LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=16).save_pretrained(
        tmp_path
    )
    config = configure({"model_name_or_path": str(tmp_path)}, {"parameters": "2k"})
    options = {
        "method": config.method,
        "r": config.r,
        "rank_pattern": config.rank_pattern,
        "options": config.options,
    }
    modes = {"num_modes": config.num_modes, "crossed_modes": config.crossed_modes}
    assert 1960 <= plan_from_model_config(str(tmp_path), **options, **modes).parameters <= 2000


@pytest.mark.parametrize(("given", "ndlora", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(given, ndlora, words, configure):
    with pytest.raises(NdLoraValueError, match=words):
        configure(given, ndlora)


@pytest.fixture
def write(base, options, datasets_by_form, tmp_path):
    """Function from further YAML keys to the YAML file's path."""

    def to(more):
        (tmp_path / "data").mkdir()
        datasets_by_form["text"].to_json(tmp_path / "data/train.jsonl")
        path = tmp_path / "run.yaml"
        keys = {**options, "model_name_or_path": base, "dataset_name": str(tmp_path / "data"), **more}
        path.write_text(yaml.safe_dump(keys), encoding="utf-8")
        return str(path)

    return to


@pytest.mark.slow
@pytest.mark.step("ndlora sft", host="SFTTrainer", method="nlora")
def test_a_yaml_trains_and_saves(write, tmp_path):
    from ndlora_plugins.integrations.trl.sft import main

    path = write(
        {
            "ndlora": {"method": "nlora", "r": 4, "callback": {"core_only_at": 0.5, "export": "lora"}},
            "lora_dropout": 0.1,
        }
    )
    main(["--config", path, "--max_steps", "2", "--lora_target_modules", "q_proj", "v_proj"])
    saved = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert saved["peft_type"] == "NDLORA" and saved["method"] == "nlora" and saved["r"] == 4
    assert saved["lora_dropout"] == 0.1 and sorted(saved["target_modules"]) == ["q_proj", "v_proj"]
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "out/lora/adapter_config.json").read_text())["peft_type"] == "LORA"


@pytest.mark.slow
@pytest.mark.step("ndlora sft", host="SFTTrainer", method="einsum")
def test_an_option_of_a_method_reaches_the_adapter(write, tmp_path):
    from ndlora_plugins.integrations.trl.sft import main

    options = {"equation": "out r, r s, s in -> out in", "sizes": {"s": 3}, "names": ["up", "core", "down"]}
    main(["--config", write({"ndlora": {"method": "einsum", "r": 4, "options": options}})])
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["options"] == options
    saved = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {tuple(value.shape) for name, value in saved.items() if name.endswith(".core")} == {(4, 3)}


def test_an_unknown_key_of_the_yaml_is_named(write):
    from ndlora_plugins.integrations.trl.sft import main

    with pytest.raises(NdLoraValueError, match="--ndlroa"):
        main(["--config", write({"ndlroa": "nlora"})])


def test_no_data_is_said(write):
    from ndlora_plugins.integrations.trl.sft import main

    with pytest.raises(NdLoraValueError, match="dataset_name"):
        main(["--config", write({"dataset_name": None})])


def test_without_trl_the_extra_is_named(monkeypatch):
    from ndlora_plugins.integrations import trl as ours

    monkeypatch.delitem(sys.modules, "ndlora_plugins.integrations.trl.sft", raising=False)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(MissingExtraError, match=r"ndlora-plugins\[trl\]"):
        _ = ours.NdLoraArguments
