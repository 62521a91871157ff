"""ms-swift's own commands on a tiny Llama: train, resume, go on, infer, export; flags that cannot apply.

Run by `make test-swift`, in the environment that ms-swift's pins ask for.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch

from ndlora_plugins.errors import MissingExtraError, NdLoraValueError
from ndlora_plugins.integrations.ms_swift.flags import config_fields, refuse_what_cannot_apply
from ndlora_plugins.integrations.ms_swift.tuner import activate

step = pytest.mark.step
METHODS = ("crossed", "ndlinear", "slora", "nlora", "inttune", "einsum")  # the columns of docs/hosts.md
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} </s>{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(scope="session")
def tiny(save_tiny_model, tmp_path_factory):
    texts = ["Two and two is four.", "user : assistant : system"]
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model", texts, TEMPLATE)


@pytest.fixture(scope="session")
def options(tiny, tmp_path_factory):
    """A function: an output directory and further flags -> what `swift sft` is called with."""
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    row = {
        "messages": [{"role": "user", "content": "Two and two"}, {"role": "assistant", "content": "is four."}]
    }
    data.write_text((json.dumps(row) + "\n") * 16)
    least = {
        "model": tiny,
        "model_type": "llama",
        "template": "dummy",
        "dataset": data,
        "tuner_type": "ndlora",
        "torch_dtype": "float32",
        "learning_rate": 1e-2,
        "max_steps": 2,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "add_version": "false",
        "report_to": "none",
    }

    def written(output, **flags):
        every = {**least, "output_dir": output, **flags}
        return [word for flag, value in every.items() for word in (f"--{flag}", str(value))]

    return written


@pytest.fixture
def swift(monkeypatch):
    """The commands of ms-swift as functions of a list of flags."""
    pytest.importorskip("swift.pipelines")
    import modelscope_hub._legacy_api
    import swift

    monkeypatch.setenv("USE_HF", "1")
    monkeypatch.delenv("NDLORA_CONFIG", raising=False)
    # it looks for the model's repository, and there is no network
    monkeypatch.setattr(modelscope_hub._legacy_api, "REPO_TREE_PAGE_MAX_ATTEMPTS", 1)

    return swift


def adapter(directory):
    return json.loads((directory / "adapter_config.json").read_text())


@pytest.mark.parametrize("method", METHODS)
@step("train, save, continue", host="ms-swift")
def test_train_and_resume(swift, options, fields_of, method, tmp_path, monkeypatch):
    monkeypatch.setenv(
        "NDLORA_CONFIG", json.dumps(fields_of(method) | ({} if method == "crossed" else {"r": 4}))
    )
    swift.sft_main(options(tmp_path / "out"))
    saved = adapter(tmp_path / "out" / "checkpoint-2")
    assert (saved["peft_type"], saved["method"]) == ("NDLORA", method)
    more = {"resume_from_checkpoint": tmp_path / "out" / "checkpoint-2", "max_steps": 4}
    swift.sft_main(options(tmp_path / "out", **more))
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4


def test_the_example(swift, options, tmp_path, monkeypatch):
    from swift.cli.main import parse_yaml_args

    monkeypatch.setattr(os, "environ", {**os.environ})
    words = [str(pathlib.Path(__file__).parents[2] / "examples" / "ms_swift.yml")]
    parse_yaml_args(words)  # what `swift sft FILE` does; the flags behind it are for this tiny model
    swift.sft_main([*words, *options(tmp_path / "out", num_train_epochs=1, gradient_accumulation_steps=1)])
    saved = adapter(tmp_path / "out" / "checkpoint-2")
    assert (saved["peft_type"], saved["method"]) == ("NDLORA", "crossed")


@step("train, save, load, continue, merge, export", host="ms-swift", method="crossed")
def test_what_is_trained_is_used(swift, options, tiny, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    swift.sft_main(options(tmp_path / "first", lora_rank=2, learning_rate=0.3))
    first = tmp_path / "first" / "checkpoint-2"
    assert adapter(first)["r"] == 2
    swift.sft_main(options(tmp_path / "second", adapters=first, learning_rate=0.3))
    second = tmp_path / "second" / "checkpoint-2"
    assert adapter(second)["r"] == 2

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), second).eval()
    words = torch.arange(4, 14)[None]
    expected = model(words).logits
    flags = ["--adapters", str(second), "--torch_dtype", "float32", "--load_args", "true"]
    swift.export_main([*flags, "--merge_lora", "true", "--output_dir", str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(words).logits, expected, atol=1e-4, rtol=1e-4)

    requests = tmp_path / "questions.jsonl"
    requests.write_text(json.dumps({"messages": [{"role": "user", "content": "Two and two"}]}) + "\n")
    more = ["--val_dataset", str(requests), "--max_new_tokens", "4", "--temperature", "0"]
    answers = {}
    for name, given in {"adapter": flags, "merged": ["--model", str(tmp_path / "merged"), *MODEL]}.items():
        found = swift.infer_main([*given, *more, "--result_path", str(tmp_path / f"{name}.jsonl")])
        answers[name] = found[0]["response"]
    assert answers["adapter"] == answers["merged"]


MODEL = ["--model_type", "llama", "--template", "dummy", "--torch_dtype", "float32"]
# the door, and what a user writes where it is shut -> whether `swift sft --tuner_type ndlora` is known
DOORS = {
    "open": ({}, None),
    "shut, a plugin of one line": ({"NDLORA_AUTOLOAD": "0"}, "import ndlora_plugins\n"),
}


@pytest.mark.slow
@pytest.mark.parametrize("door", DOORS)
@step("train", host="ms-swift", method="crossed")
def test_the_command_line(options, door, tmp_path):
    environment, plugin = DOORS[door]
    flags = options(tmp_path / "out")
    if plugin:
        (tmp_path / "plugin.py").write_text(plugin)
        flags += ["--external_plugins", str(tmp_path / "plugin.py")]
    command = pathlib.Path(sys.executable).with_name("swift")
    if not command.exists():
        pytest.skip("ms-swift is not installed")
    environment = {**os.environ, "USE_HF": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(
        [command, "sft", *flags], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert adapter(tmp_path / "out" / "checkpoint-2")["peft_type"] == "NDLORA"


@dataclass
class Arguments:
    """Of ms-swift's `SftArguments` what our translation reads, with its defaults."""

    tuner_backend: str = "peft"
    target_modules: list = field(default_factory=lambda: ["all-linear"])
    lora_rank: int = 8
    lora_alpha: float = 32.0
    lora_dropout: float = 0.05
    lora_bias: str = "none"
    lora_dtype: str | None = None
    lorap_lr_ratio: float | None = None
    lora_ga_scale: str = "stable"
    use_rslora: bool = False
    use_dora: bool = False
    use_swift_lora: bool = False
    vllm_enable_lora: bool = False
    init_weights: str | bool = True
    vera_rank: int = 256
    target_parameters: list | None = None


# flags, what is said
REFUSALS = [
    ({"use_dora": True}, "`--use_dora True` cannot apply to --tuner_type ndlora: DoRA's magnitude vector"),
    ({"lorap_lr_ratio": 16.0}, "`--lorap_lr_ratio 16.0` cannot apply"),
    ({"lora_dtype": "bfloat16"}, "`--lora_dtype bfloat16` cannot apply"),
    ({"vllm_enable_lora": True}, "vLLM serves LoRA adapters only"),
    ({"use_swift_lora": True}, "ms-swift's own LoRA"),
    ({"vera_rank": 64}, "`--vera_rank 64` is of --tuner_type vera"),
    ({"lora_ga_scale": "gd"}, "`--lora_ga_scale gd` is of --tuner_type lora with --init_weights lora-ga"),
    ({"tuner_backend": "unsloth"}, "`--tuner_backend unsloth` cannot apply"),
]
# flags, NDLORA_CONFIG, the fields of NdLoraConfig
TRANSLATED = [
    ({}, None, {}),
    ({"lora_rank": 4, "lora_alpha": 4.0, "init_weights": "n_lora"}, None,
     {"r": 4, "lora_alpha": 4.0, "init_lora_weights": "n_lora"}),
    ({"init_weights": False, "use_rslora": True}, None, {"init_lora_weights": False, "use_rslora": True}),
    ({"lora_rank": 4}, "{method: slora}", {"r": 4, "method": "slora"}),
    ({}, "{'method': 'ndlinear', 'options': {'num_modes': 3}}", {"method": "ndlinear", "options": {"num_modes": 3}}),
]  # fmt: skip
WRONG = [
    ({"lora_rank": 4}, "{r: 2}", "NDLORA_CONFIG and --lora_rank say the same field"),
    ({}, "slora", "says no fields of NdLoraConfig"),
    ({}, "{", "is no YAML"),
]


@pytest.mark.parametrize(("flags", "sentence"), REFUSALS)
def test_flags_that_cannot_apply(flags, sentence):
    with pytest.raises(NdLoraValueError, match=re.escape(sentence)):
        refuse_what_cannot_apply(Arguments(**flags))


@pytest.mark.parametrize(("flags", "more", "expected"), TRANSLATED)
def test_flags_are_translated(flags, more, expected):
    refuse_what_cannot_apply(Arguments(**flags))
    assert config_fields(Arguments(**flags), {"NDLORA_CONFIG": more}) == expected


@pytest.mark.parametrize(("flags", "more", "sentence"), WRONG)
def test_a_configuration_that_cannot_be_read(flags, more, sentence):
    with pytest.raises(NdLoraValueError, match=re.escape(sentence)):
        config_fields(Arguments(**flags), {"NDLORA_CONFIG": more})


def test_a_version_without_the_table_of_tuners(monkeypatch):
    monkeypatch.setitem(sys.modules, "swift.tuner_plugin.mapping", None)
    with pytest.raises(
        MissingExtraError, match="needs ms-swift 4.0 or later, which has swift.tuner_plugin.mapping"
    ):
        activate()


def test_errors_bear_the_names_of_the_flags(swift, options, tmp_path):
    with pytest.raises(NdLoraValueError, match=r"init_lora_weights is --init_weights here"):
        swift.sft_main(options(tmp_path / "out", init_weights="pissa"))
    with pytest.raises(NdLoraValueError, match="`--use_dora True` cannot apply"):
        swift.sft_main(options(tmp_path / "out", use_dora="true"))
