"""An adapter loads in a process that never imports ndlora_plugins; nothing of ours can break torch or PEFT."""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from peft import get_peft_model

from ndlora_plugins import NdLoraConfig

LOADERS = {
    "PeftModel": "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)",
    "AutoPeftModel": "AutoPeftModelForCausalLM.from_pretrained(adapter)",
    "AutoModel": "AutoModelForCausalLM.from_pretrained(adapter).eval()",
}


def run(code, expect_error=False, **environment):
    """Run code in a fresh interpreter and return (stdout, stderr)."""
    result = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert (result.returncode != 0) == expect_error, result.stderr
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(base directory, adapter directory, expected logits) of an IntTune adapter, the one that needs most."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
        )
    )
    base.save_pretrained(root / "base")
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(root / "base"), NdLoraConfig(method="inttune", task_type="CAUSAL_LM")
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter)) if parameter.requires_grad else None
    model.save_pretrained(root / "adapter")
    logits = model.eval()(torch.arange(20).view(2, 10)).logits
    torch.save(logits.detach(), root / "logits.pt")
    return root


def test_loads_without_our_import(saved):
    code = f"""
        import os, sys
        import torch
        from peft import AutoPeftModelForCausalLM, PeftModel
        from transformers import AutoModelForCausalLM
        assert "ndlora_plugins.integrations.trl" not in sys.modules
        base, adapter = {str(saved / "base")!r}, {str(saved / "adapter")!r}
        for loader in {list(LOADERS.values())!r}:
            if child := os.fork():  # each loads first in a process of its own, with these imports
                assert os.waitpid(child, 0)[1] == 0, loader
                continue
            logits = eval(loader)(torch.arange(20).view(2, 10)).logits
            torch.testing.assert_close(logits, torch.load({str(saved / "logits.pt")!r}))
            break
    """
    run(code)


# what the process does first, its environment, whether PEFT knows NDLORA then
MODES = [
    ("import peft", {}, True),
    ("import peft", {"NDLORA_AUTOLOAD": "0"}, False),
    ("import peft", {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, False),
    ("import peft; import ndlora_plugins", {"NDLORA_AUTOLOAD": "0"}, True),
    ("import ndlora_plugins", {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, True),
    ("import ndlora_plugins; import torch", {}, True),
    ("from ndlora_plugins import NdLoraConfig", {"NDLORA_AUTOLOAD": "0"}, True),
    ("import ndlora_plugins.integrations.peft.configuration.config", {}, True),
    (
        "from ndlora_plugins.integrations.trl import NdLoraCallback as Ours; Ours();"
        "import sys; assert 'trl' not in sys.modules",
        {},
        True,
    ),
]


@pytest.mark.parametrize("first, environment, known", MODES)
def test_modes_of_registration(first, environment, known):
    code = f"""
        import warnings
        warnings.simplefilter("error", RuntimeWarning)
        {first}
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING
        print("NDLORA" in PEFT_TYPE_TO_CONFIG_MAPPING)
    """
    assert run(code, **environment)[0].strip() == str(known)


def test_a_broken_install_of_ours_breaks_nothing():
    code = """
        import sys
        sys.modules["ndlora_plugins.integrations.peft.registration"] = None  # importing it raises
        import torch, peft
        peft.LoraConfig()
        print("fine")
    """
    out, err = run(code)
    assert out.strip() == "fine"
    assert err.count("could not attach itself to peft.tuners") == 1 and "NDLORA_AUTOLOAD=0" in err


def test_another_peft_than_we_know_is_left_alone_and_told_of(saved):
    code = f"""
        import ndlora_autoload, os, warnings
        import ndlora_plugins.integrations.peft.registration as registration
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig

        def said():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                registration.activate()
            assert caught[0].category is RuntimeWarning
            return str(caught[0].message)

        if child := os.fork():  # one that has its own NDLORA
            assert os.waitpid(child, 0)[1] == 0
        else:
            class Theirs: pass
            Theirs.__module__ = "peft.tuners.ndlora"
            PEFT_TYPE_TO_CONFIG_MAPPING["NDLORA"] = Theirs
            assert "PEFT has its own NDLORA" in said()
            assert PEFT_TYPE_TO_CONFIG_MAPPING["NDLORA"] is Theirs
            os._exit(0)
        # one that we do not fit gets a stub that explains itself
        PEFT_TYPE_TO_CONFIG_MAPPING.pop("NDLORA")
        def broken(): raise AttributeError("PeftType has changed")
        registration._register = broken
        assert "does not fit this version of PEFT" in said()
        PeftConfig.from_pretrained({str(saved / "adapter")!r})
    """
    error = run(code, expect_error=True)[1]
    assert "ImportError: This adapter is of type NDLORA, of the package ndlora-plugins" in error


def test_a_model_unpickles_in_a_fresh_process(tmp_path):
    import pickle

    layer = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(8, 8)), NdLoraConfig(target_modules=["0"])
    ).base_model.model
    (tmp_path / "layer.pkl").write_bytes(pickle.dumps(layer))
    run(f"import pickle, torch; pickle.load(open({str(tmp_path / 'layer.pkl')!r}, 'rb'))(torch.ones(1, 8))")


def test_the_enum_member_behaves_as_one_of_pefts_own():
    import copy
    import json
    import pickle

    from peft.utils.peft_types import PeftType

    member = PeftType("NDLORA")
    assert member is PeftType.NDLORA is PeftType["NDLORA"] is NdLoraConfig().peft_type
    assert member in list(PeftType) and member == "NDLORA" and json.dumps(member) == '"NDLORA"'
    assert copy.deepcopy(member) is member
    assert all(pickle.loads(pickle.dumps(member, protocol)) is member for protocol in range(6))
