"""Exports against the adapter they came from: stock LoRA, LoKr, merged files, and PEFT's own conversion."""

import functools
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from representative import BESIDE_AXOLOTL
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification
from typer.testing import CliRunner

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.commands.export import export
from ndlora_plugins.errors import NdLoraValueError, NdLoraWarning
from ndlora_plugins.integrations.peft.adapters.check import check_adapter
from ndlora_plugins.integrations.peft.exports.export import export_adapter
from ndlora_plugins.integrations.peft.files.adapter import AdapterReader

# adapter -> rank of its exact LoRA
LOW_RANK = {
    "slora": ({"method": "slora", "r": 4, "lora_alpha": 8}, 4),
    "slora-rslora-patterns": (
        {
            "method": "slora",
            "r": 4,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, "c_attn": 2},
            "alpha_pattern": {"down_proj": 9},
        },
        4,
    ),
    "slora-from-weights": ({"method": "slora", "init_lora_weights": "n_lora", "r": 4}, 8),
    "nlora": ({"method": "nlora", "r": 4}, 8),
    "nlora-no-anchor": ({"method": "nlora", "r": 4, "anchor": "none"}, 4),
    "inttune": ({"method": "inttune", "r": 4}, 4),
    "nlora-pivots": ({"init_lora_weights": "n_lora_pivots", "r": 4}, 8),
    "ndlinear-crossed": ({"crossed_modes": 2, "lora_alpha": 3}, 4),
    "ndlinear-crossed-3-modes": ({"crossed_modes": 2, "num_modes": 3, "lora_alpha": 3}, 8),
    "inttune-no-anchor": (
        {"method": "inttune", "init_lora_weights": "n_lora", "r": 4, "anchor": "none"},
        4,
    ),
}
READ = {
    **{case: options for case, (options, _) in LOW_RANK.items()},
    # vectors of few numbers, of which rounding changes the sums
    "random-vectors": {"method": "random_tucker", "r": 1, "random_seed": 3},
}
READS_BASE = {"slora-from-weights", "nlora", "inttune", "inttune-no-anchor"}
KRONECKER = {
    "ndlinear": {"method": "ndlinear", "lora_alpha": 3},
    "ndlinear-3-modes": {"method": "ndlinear", "num_modes": 3},
    "ndlinear-4-terms": {"method": "ndlinear", "r": 4},
    "ndlinear-reference-start": {"init_lora_weights": "ndlinear"},
}
# adapter -> the layers, and the rank that PEFT's conversion is asked for
CONVERSIONS = {
    **{case: (options, 8) for case, (options, _) in LOW_RANK.items()},
    **{case: ({**options, "target_modules": ["q_proj", "c_fc"]}, 48) for case, options in KRONECKER.items()},
}
LOKR = {
    "balanced": {"method": "ndlinear", "lora_alpha": 3},
    "uneven": {
        "modes": {"in_modes": [4, 12], "out_modes": [4, 12]},
        "target_modules": ["q_proj"],
        "lora_alpha": 2,
    },
    "random": {"method": "ndlinear", "init_lora_weights": False},
    "modules-to-save": {"method": "ndlinear", "modules_to_save": ["lm_head"]},
}
# adapter, what the error must say
NOT_LOKR = [
    ({"r": 2}, "r=2 Kronecker terms"),
    ({"num_modes": 3}, "3 modes, and LoKr has two"),
    ({"init_lora_weights": "ndlinear"}, "anchor='snapshot' makes it the sum"),
    ({"method": "slora"}, "to='lora' is exact for it"),
    (
        {"method": "ndlinear", "modes": {"q_proj": {"in_modes": [4, 12]}}},
        r"'model.layers.0.self_attn.q_proj' has the modes \[4, 12\]",
    ),
    ({"modes": {"in_modes": [12, 4], "out_modes": [4, 12]}, "target_modules": ["q_proj"]}, "the modes"),
    ({"trainable_token_indices": [1]}, "LoKr cannot carry"),
]
# what trains beside the factors -> words of the note, whether vocabularies are tied
BESIDE = {
    "modules-to-save": ({"modules_to_save": ["lm_head"]}, "modules_to_save", False),
    "modules-to-save-tied": ({"modules_to_save": ["lm_head"]}, "modules_to_save", True),
    "embedding-tied": ({"modules_to_save": ["embed_tokens"]}, "modules_to_save", True),
    "embedding-and-head": ({"modules_to_save": ["embed_tokens", "lm_head"]}, "modules_to_save", True),
    "norms": ({"modules_to_save": ["norm"]}, "modules_to_save", False),
    "tokens": ({"trainable_token_indices": [3, 7, 5]}, "trainable_token_indices", False),
    "tokens-by-name": (
        {"trainable_token_indices": {"embed_tokens": [3, 7, 5]}},
        "trainable_token_indices",
        False,
    ),
    "tokens-tied": ({"trainable_token_indices": [3, 7, 5]}, "trainable_token_indices", True),
}
HEAD, ROWS = (
    "base_model.model.lm_head.weight",
    "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
)
Q = "base_model.model.model.layers.0.self_attn.q_proj"
# what is done to the tensors of a slora adapter with a head and two token rows, what the error must say
BROKEN_BESIDE = {
    "no-head": (lambda t: t.pop(HEAD), "modules_to_save names 'lm_head', of which the file holds no tensor"),
    "no-rows": (lambda t: t.pop(ROWS), "the file holds no token rows"),
    "nan-in-the-head": (lambda t: t[HEAD].fill_(float("nan")), "lm_head.weight' holds NaN or infinity"),
    "infinity-in-the-rows": (lambda t: t[ROWS].fill_(float("inf")), "delta' holds NaN or infinity"),
    "integer-head": (lambda t: t.update({HEAD: t[HEAD].to(torch.int8)}), "is of dtype int8"),
    "integer-factor": (
        lambda t: t.update({f"{Q}.ndlora_factors.up": torch.ones(48, 4).to(torch.int8)}),
        "int8",
    ),
    "boolean-factors": (lambda t: t.update({k: v > 0 for k, v in t.items()}), "is of dtype bool"),
    "base-weight": (
        lambda t: t.update({f"{Q}.base_layer.weight": torch.ones(48, 48)}),
        "1 tensors belong to nothing in the configuration: 'model.layers.0.self_attn.q_proj.weight'",
    ),
    "head-twice": (lambda t: t.update({HEAD.replace("weight", "base_layer.weight"): t[HEAD] + 1}), "twice"),
    "no-prefix": (lambda t: t.update({"lm_head.weight": t.pop(HEAD)}), "belong to nothing"),
    "strange-layer": (
        lambda t: [
            t.update({key.replace("q_proj", "x_proj"): t[key].clone()})
            for key in list(t)
            if key.startswith(Q)
        ],
        "x_proj",
    ),
}
# options, what the error must say
WRONG = [
    ({"to": "onnx"}, "to='onnx': choose one of"),
    ({"to": "lokr", "rank": 4}, "choose LoRA's rank"),
    ({"to": "merged", "dtype": torch.float16}, "leave dtype out"),
    ({"rank": 4, "energy": 0.5}, "give one of the three"),
    ({}, "--rank, --energy, --max-error"),
]
MODELS = ["make_llama", "make_gpt2"]
pytestmark = pytest.mark.filterwarnings("ignore")  # patterns and notes that a case does not ask about
STOCK = """
    import sys
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(1)
    for adapter in {adapters!r}:
        base = AutoModelForCausalLM.from_pretrained({base!r})
        logits = PeftModel.from_pretrained(base, adapter).eval()(torch.arange(20).view(2, 10)).logits
        torch.save(logits.detach(), adapter + ".pt")
    assert not any(name.partition(".")[0] == "ndlora_plugins" for name in sys.modules)
"""
# case -> what it is exported to, to be loaded in a process that knows nothing of us
ELSEWHERE = {"nlora": "lora", "slora-rslora-patterns": "lora", "balanced": "lokr"}
# exit status of an export that is stopped while it writes, what the next one says
STOPPED = {
    signal.SIGTERM: (128 + signal.SIGTERM, ""),
    signal.SIGKILL: (
        -signal.SIGKILL,
        r"Removed .*\.out-unfinished/files \([\d,]+ bytes\), left by a process",
    ),
}
ONCE = pytest.mark.skipif(BESIDE_AXOLOTL, reason="of our code alone: it runs beside the newest PEFT")
OWN_MOUNTS = ["unshare", "--map-root-user", "--mount"]
INTO_A_MOUNT = (
    f"mount --bind elsewhere out && exec {sys.executable} -P -m ndlora_plugins.commands.main export"
)


@pytest.fixture(params=MODELS)
def make_model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def stock_logits(tmp_path):
    """A function that gives exported adapters' logits in a process that knows nothing of us."""

    def run(*names):
        adapters = [str(tmp_path / name) for name in names]
        code = STOCK.format(base=str(tmp_path / "base"), adapters=adapters)
        result = subprocess.run(
            [sys.executable, "-P", "-c", textwrap.dedent(code)],
            env={**os.environ, "NDLORA_AUTOLOAD": "0", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return [torch.load(f"{adapter}.pt") for adapter in adapters]

    return run


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", LOW_RANK)
def test_low_rank_methods_become_the_same_lora(case, make_model, trained, tokens, tmp_path, load):
    options, rank = LOW_RANK[case]
    expected = trained(make_model, **options)
    report = export_adapter(tmp_path / "adapter", tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["r"], saved["lora_alpha"]) == ("LORA", rank, rank)
    assert saved["rank_pattern"] == saved["alpha_pattern"] and not saved["use_rslora"]
    assert report.largest_error < 2e-7
    assert_close(load(tmp_path / "base", tmp_path / "out")(tokens).logits, expected)


def test_it_loads_where_we_are_not(make_llama, trained, stock_logits, tmp_path):
    expected = {}
    for case, to in ELSEWHERE.items():
        expected[case] = trained(make_llama, **{**{k: v[0] for k, v in LOW_RANK.items()}, **LOKR}[case])
        export_adapter(tmp_path / "adapter", tmp_path / case, to)
    for found, logits in zip(stock_logits(*expected), expected.values(), strict=True):
        assert_close(found, logits)


@pytest.mark.parametrize("case", LOW_RANK)
def test_the_base_is_needed_only_where_its_weights_are_read(case, make_llama, trained, tmp_path):
    trained(make_llama, **LOW_RANK[case][0])
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    if case in READS_BASE:
        with pytest.raises(NdLoraValueError, match="neither a directory nor in the local cache"):
            export_adapter(tmp_path / "adapter", tmp_path / "out")
    export_adapter(
        tmp_path / "adapter",
        tmp_path / "out",
        base=str(tmp_path / "elsewhere") if case in READS_BASE else None,
    )


@pytest.mark.parametrize("case", KRONECKER)
def test_kronecker_terms_become_lora_of_a_chosen_rank(case, make_model, trained, tokens, tmp_path, load):
    expected = trained(make_model, **KRONECKER[case])
    with pytest.raises(NdLoraValueError, match=r"would be of .* weights of its layers are .*--any-size"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", max_error=0)
    whole = export_adapter(tmp_path / "adapter", tmp_path / "out", max_error=0, any_size=True)
    assert whole.largest_error < 1e-6
    assert_close(load(tmp_path / "base", tmp_path / "out")(tokens).logits, expected)
    less = export_adapter(tmp_path / "adapter", tmp_path / "less", rank=6)
    layers = load(tmp_path / "base", tmp_path / "adapter").base_model.model
    stock = load(tmp_path / "base", tmp_path / "less").base_model.model
    for layer in less.layers:
        delta = layers.get_submodule(layer.name).get_delta_weight("default")
        error = (stock.get_submodule(layer.name).get_delta_weight("default") - delta).norm() / delta.norm()
        assert layer.form == "rank 6" and float(error) == pytest.approx(layer.error, abs=1e-6)


@pytest.mark.parametrize("target", [{"energy": 0.9}, {"max_error": 0.3}])
def test_ranks_by_error_differ(target, make_llama, trained, tokens, tmp_path, load):
    expected = trained(make_llama, r=2)
    report = export_adapter(tmp_path / "adapter", tmp_path / "out", **target)
    assert f"--max-lora-rank 32 --lora-modules NAME={tmp_path / 'out'}" in report.server_flags
    assert report.largest_error <= 0.3163 and len({layer.form for layer in report.layers}) > 1
    logits = load(tmp_path / "base", tmp_path / "out")(tokens).logits
    assert 0 < (logits - expected).norm() < (load(tmp_path / "base")(tokens).logits - expected).norm()


def test_a_rank_that_vllm_does_not_serve_is_written_only_when_asked_for(make_llama, trained, tmp_path):
    wide = functools.partial(make_llama, hidden_size=1200, num_hidden_layers=1)
    trained(wide, method="slora", r=520, target_modules=["q_proj"])
    with pytest.raises(NdLoraValueError, match="would be of rank 520, and vLLM serves 512 at most"):
        export_adapter(tmp_path / "adapter", tmp_path / "out")
    report = export_adapter(tmp_path / "adapter", tmp_path / "out", any_size=True)
    assert report.largest_rank == 520 and report.server_flags is None
    nested = {"rank": 516, "nested": True}
    with pytest.raises(NdLoraValueError, match="would be of rank 516"):
        export_adapter(tmp_path / "adapter", tmp_path / "nested", **nested)
    assert (
        export_adapter(tmp_path / "adapter", tmp_path / "nested", any_size=True, **nested).largest_rank == 516
    )


def test_low_rank_methods_can_be_made_smaller(make_llama, trained, tmp_path):
    trained(make_llama, method="slora", r=8)
    report = export_adapter(tmp_path / "adapter", tmp_path / "out", rank=2)
    assert {layer.form for layer in report.layers} == {"rank 2"} and 0 < report.largest_error < 1


@pytest.mark.parametrize("case", LOKR)
def test_one_kronecker_term_becomes_the_same_lokr(case, make_llama, trained, tokens, tmp_path, load):
    expected = trained(make_llama, **LOKR[case])
    report = export_adapter(tmp_path / "adapter", tmp_path / "out", "lokr")
    assert report.largest_error < 1e-6
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in keys} <= {"lokr_w1", "lokr_w2", "weight"}
    assert_close(load(tmp_path / "base", tmp_path / "out")(tokens).logits, expected)


@pytest.mark.parametrize("options, message", NOT_LOKR)
def test_what_cannot_become_lokr(options, message, make_llama, trained, tmp_path):
    trained(make_llama, **options)
    with pytest.raises(NdLoraValueError, match=message):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "lokr")
    assert not (tmp_path / "out").exists()


def test_a_conv1d_cannot_become_lokr(make_gpt2, trained, tmp_path):
    trained(make_gpt2)
    with pytest.raises(NdLoraValueError, match="it is a Conv1D"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "lokr", base=str(tmp_path / "base"))


@pytest.mark.parametrize("case", BESIDE)
def test_what_trains_beside_the_factors_is_carried_and_named(
    case, make_llama, trained, tokens, tmp_path, load
):
    options, note, tied = BESIDE[case]
    expected = trained(lambda: make_llama(tie_word_embeddings=tied), method="slora", **options)
    with pytest.warns(NdLoraWarning, match=f"{note}=.* servers such as vLLM"):
        report = export_adapter(tmp_path / "adapter", tmp_path / "out")
    assert len(report.notes) == 1
    assert_close(load(tmp_path / "base", tmp_path / "out")(tokens).logits, expected)
    export_adapter(tmp_path / "adapter", tmp_path / "merged", "merged")
    assert_close(load(tmp_path / "merged")(tokens).logits, expected)


@pytest.mark.skipif(not hasattr(BaseTuner, "_get_adapter_state_dict"), reason="peft 0.20 would not save them")
@pytest.mark.parametrize("bias", ["all", "ndlora_only"])
def test_biases_are_carried_and_named(bias, make_gpt2, trained, tokens, tmp_path, load):
    trained(make_gpt2, method="slora", bias=bias)
    expected = load(tmp_path / "base", tmp_path / "adapter")(tokens).logits  # what PEFT saved of them
    with pytest.warns(NdLoraWarning, match="bias="):
        export_adapter(tmp_path / "adapter", tmp_path / "out")
    assert_close(load(tmp_path / "base", tmp_path / "out")(tokens).logits, expected)
    export_adapter(tmp_path / "adapter", tmp_path / "merged", "merged")
    assert_close(load(tmp_path / "merged")(tokens).logits, expected)


@pytest.mark.parametrize("to", ["lora", "merged"])
def test_another_base_model_is_refused(to, make_llama, trained, tmp_path):
    trained(make_llama, method="inttune")
    make_llama(seed=5).save_pretrained(tmp_path / "other")
    with pytest.raises(NdLoraValueError, match="differ from those that the adapter was trained on"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", to, base=str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["lora", "merged"])
def test_nothing_is_overwritten_and_a_failure_leaves_nothing(to, make_llama, trained, tmp_path):
    trained(make_llama, method="slora")
    with pytest.raises(NdLoraValueError, match="nothing is overwritten"):
        export_adapter(tmp_path / "adapter", tmp_path / "base", to)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: value * float("nan") for key, value in load_file(file).items()}, file)
    with pytest.raises(NdLoraValueError, match="NaN or infinity"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    (tmp_path / "empty").mkdir()
    save_file({key: torch.zeros_like(value) for key, value in load_file(file).items()}, file)
    assert export_adapter(tmp_path / "adapter", tmp_path / "empty", to).largest_error == 0


@pytest.mark.parametrize("prepare", [Path.mkdir, Path.exists], ids=["to an empty directory", "to nothing"])
def test_a_link_is_followed(prepare, make_llama, trained, tmp_path):
    trained(make_llama, method="slora")
    (tmp_path / "link").symlink_to("elsewhere")
    prepare(tmp_path / "elsewhere")
    export_adapter(tmp_path / "adapter", tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "elsewhere", "link"]
    assert (tmp_path / "link").is_symlink() and (tmp_path / "elsewhere" / "adapter_config.json").is_file()


@ONCE
@pytest.mark.skipif(
    subprocess.run([*OWN_MOUNTS, "true"], capture_output=True).returncode != 0,
    reason="nothing can be mounted",
)
def test_a_mount_point_is_refused_at_the_start(make_llama, trained, tmp_path):
    trained(make_llama)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    command = [*OWN_MOUNTS, "sh", "-c", f"{INTO_A_MOUNT} broken-adapter --to lora --output out"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "out is a mount point" in result.stderr


@ONCE
@pytest.mark.parametrize(("number", "expected"), STOPPED.items(), ids=[stop.name for stop in STOPPED])
def test_an_export_that_is_stopped_leaves_all_or_nothing(
    number, expected, make_llama, trained, tmp_path, caplog
):
    trained(make_llama, "20KB", method="slora")
    shard = next((tmp_path / "base").glob("model-00001-*"))
    shard.rename(tmp_path / "kept")
    os.mkfifo(shard)  # whoever opens it waits: the embedding, which nothing else reads
    paths = [str(tmp_path / "adapter"), "--to", "merged", "--output", str(tmp_path / "out")]
    command = [sys.executable, "-P", "-m", "ndlora_plugins.commands.main", "export", *paths]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (tmp_path / ".out-unfinished" / "files" / "config.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
        with pytest.raises(NdLoraValueError, match="Another process is writing"):
            export_adapter(tmp_path / "adapter", tmp_path / "out", "lora")
        process.send_signal(number)
    status, message = expected
    assert process.returncode == status and not (tmp_path / "out").exists()
    assert (tmp_path / ".out-unfinished").exists() == bool(message)
    (tmp_path / "kept").rename(shard)
    with caplog.at_level(logging.WARNING, "ndlora_plugins"):
        export_adapter(tmp_path / "adapter", tmp_path / "out", "merged")
    assert re.search(message, caplog.text) and bool(caplog.text) == bool(message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]


@pytest.mark.parametrize("to", ["lora", "lokr", "merged"])
def test_a_missing_layer_is_an_error(to, make_llama, trained, tmp_path):
    trained(make_llama)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file(
        {key: value for key, value in load_file(file).items() if "layers.0.self_attn.q" not in key}, file
    )
    with pytest.raises(
        NdLoraValueError, match="1 layers have no tensor in .*'model.layers.0.self_attn.q_proj'"
    ):
        export_adapter(tmp_path / "adapter", tmp_path / "out", to)


@pytest.mark.parametrize("to", ["lora", "lokr", "merged"])
@pytest.mark.parametrize("case", BROKEN_BESIDE)
def test_a_file_that_is_broken_beside_the_factors(case, to, make_llama, trained, tmp_path):
    change, message = BROKEN_BESIDE[case]
    trained(make_llama, method="slora", r=4, modules_to_save=["lm_head"], trainable_token_indices=[3, 5])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    assert message in " ".join(check_adapter(tmp_path / "adapter").problems)
    with pytest.raises(NdLoraValueError, match=re.escape(message)):
        export_adapter(tmp_path / "adapter", tmp_path / "out", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def no_word_of_schema_1(fields):
    return {**fields, "schema_version": 1, "layers": None, "weight_forms": None}


def linear_of_schema_2(fields):
    # a table's shape of a linear layer is (out, in), an embedding's (numbers, out)
    layers = {
        path: [name, "linear", shape[::-1] if kind == "embedding" else shape]
        for path, (name, kind, shape) in fields["layers"].items()
    }
    return {**fields, "layers": layers}


@pytest.mark.parametrize("make, layer, base, message", [
    ("make_llama", "embed_tokens", None, "is an embedding by its name, but its configuration does not say so"),
    ("make_gpt2", "wpe", "base", "has no linear layer 'transformer.wpe'"),
])  # fmt: skip
@pytest.mark.parametrize("says", [no_word_of_schema_1, linear_of_schema_2])
def test_an_embedding_that_is_not_said_to_be_one(
    says, make, layer, base, message, request, trained, tmp_path
):
    trained(request.getfixturevalue(make), method="slora", r=4, target_modules=["mlp.c_fc", "q_proj", layer])
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(says(json.loads(file.read_text()))))
    with pytest.raises(NdLoraValueError, match=message):
        export_adapter(tmp_path / "adapter", tmp_path / "out", base=base and str(tmp_path / base))


@pytest.mark.parametrize("options, message", WRONG)
def test_wrong_options(options, message, make_llama, trained, tmp_path):
    trained(make_llama, method="ndlinear")
    with pytest.raises(NdLoraValueError) as caught:
        export_adapter(tmp_path / "adapter", tmp_path / "out", **options)
    assert message in str(caught.value)


def test_an_adapter_of_another_kind(make_llama, tmp_path):
    get_peft_model(make_llama(), LoraConfig()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(NdLoraValueError, match="of type LORA, not NDLORA"):
        export_adapter(tmp_path / "adapter", tmp_path / "out")


def test_the_dtype_can_be_chosen(make_llama, trained, tmp_path):
    trained(make_llama, method="slora")
    report = export_adapter(tmp_path / "adapter", tmp_path / "out", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors").values()
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16} and 1e-4 < report.largest_error < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", READ)
def test_layers_are_read_as_the_model_has_them(case, dtype, make_llama, trained, tmp_path, load):
    trained(lambda: make_llama(dtype=dtype), **READ[case])
    reader = AdapterReader(tmp_path / "adapter")
    files = reader.open_base(None)
    model = load(tmp_path / "base", tmp_path / "adapter").base_model.model
    for layer in (reader.read(path, files) for path in reader.shapes):
        expected = model.get_submodule(layer.name).get_delta_weight("default")
        assert torch.equal(layer.plan.delta(layer.trained, layer.frozen) * layer.plan.scaling, expected)


@pytest.mark.parametrize("case", CONVERSIONS)
def test_pefts_own_conversion(case, make_model, trained, tokens, tmp_path, load):
    options, rank = CONVERSIONS[case]
    expected = trained(make_model, **options)
    config, tensors = convert_to_lora(load(tmp_path / "base", tmp_path / "adapter"), rank=rank)
    lora = get_peft_model(load(tmp_path / "base"), config)
    assert not set_peft_model_state_dict(lora, tensors).unexpected_keys
    torch.testing.assert_close(lora.eval()(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_command(make_llama, trained, tmp_path):
    import typer

    trained(make_llama, r=2, modules_to_save=["lm_head"])
    app = typer.Typer()
    app.command()(export)
    arguments = [
        str(tmp_path / "adapter"),
        "--to",
        "lora",
        "--output",
        str(tmp_path / "out"),
        "--max-error",
        "0.3",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for words in (
        "down_proj",
        "rank ",
        "Note: modules_to_save=",
        "vLLM serves it with --enable-lora --max-lora-rank 32",
        "14 layers",
    ):
        assert words in result.output
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, NdLoraValueError)


def test_what_vllm_does_not_serve_is_said(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4))
    model.save_pretrained(tmp_path / "base")
    config = NdLoraConfig(method="slora", r=2, target_modules=["projection", "fc1"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    report = export_adapter(tmp_path / "adapter", tmp_path / "lora", base=str(tmp_path / "base"))
    assert (
        len(report.notes) == 1
        and "some are of kind convolution. For vLLM, export to='merged'" in report.notes[0]
    )
