"""Hot swap: a loaded adapter becomes another one, as if that had been loaded; what does not fit changes nothing."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from representative import REPRESENTATIVE

from ndlora_plugins import NdLoraConfig, hotswap_adapter
from ndlora_plugins.errors import NdLoraValueError

# what differs in the adapter that is swapped in, what the message says
REFUSED = {
    "method": ({"method": "slora"}, "method='slora' on layer .*'crossed' of the loaded"),
    "rank": ({"r": 2}, "has r=2, and 1 of the loaded"),
    "modes": ({"crossed_modes": 2}, "has other options than those of the loaded"),
    "anchor": (
        {"method": "crossed", "init_lora_weights": "random", "anchor": "snapshot"},
        "anchor='snapshot' on layer",
    ),
    "fewer layers": ({"target_modules": ["q_proj"]}, "must have shape .* and the file has none"),
    "a head": ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*only the layers' own tensors"),
    "tokens": ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\]"),
}


@pytest.fixture
def save(tmp_path, make_llama, shake):
    """A function that saves a trained adapter under a name."""

    def make(name, seed, model=None, **fields):
        config = NdLoraConfig(task_type="CAUSAL_LM", **fields)
        shake(get_peft_model(model or make_llama(), config), seed=seed).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("method", REPRESENTATIVE)
def test_a_swapped_adapter_answers_as_one_that_was_loaded(method, save, fields_of, make_llama, tokens):
    one = save("one", 1, **fields_of(method))
    two = save("two", 2, **fields_of(method), lora_alpha=5, alpha_pattern={"q_proj": 3})
    model = PeftModel.from_pretrained(make_llama(), one).eval()
    hotswap_adapter(model, str(two), "default")
    expected = PeftModel.from_pretrained(make_llama(), two).eval()
    torch.testing.assert_close(logits(model, tokens), logits(expected, tokens), atol=1e-5, rtol=1e-5)
    assert model.peft_config["default"].lora_alpha == 5


def test_a_compiled_model_is_not_compiled_anew(save, make_llama, tokens):
    one, two = save("one", 1), save("two", 2)
    model = torch.compile(PeftModel.from_pretrained(make_llama(), one).eval(), backend="eager")
    before = logits(model, tokens)
    hotswap_adapter(model, str(two), "default")
    with torch.compiler.set_stance("fail_on_recompile"):
        found = logits(model, tokens)
    expected = PeftModel.from_pretrained(make_llama(), two).eval()
    torch.testing.assert_close(found, logits(expected, tokens), atol=1e-5, rtol=1e-5)
    assert not torch.equal(found, before)


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_changes_nothing(case, save, make_llama, tokens):
    fields, message = REFUSED[case]
    one, two = save("one", 1), save("two", 2, **fields)
    model = PeftModel.from_pretrained(make_llama(), one).eval()
    before = logits(model, tokens)
    with pytest.raises(NdLoraValueError, match=message):
        hotswap_adapter(model, str(two), "default")
    assert torch.equal(logits(model, tokens), before)


def test_a_file_without_checksums_is_swapped_as_it_is_loaded(save, make_llama, tokens):
    one, two = (save(name, seed, method="ffa_lora", random_seed=1) for name, seed in (("one", 1), ("two", 2)))
    file = two / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "checksums": None}))
    model = PeftModel.from_pretrained(make_llama(), one).eval()
    hotswap_adapter(model, str(two), "default")
    expected = PeftModel.from_pretrained(make_llama(), two).eval()
    assert torch.equal(logits(model, tokens), logits(expected, tokens))


def test_other_seeds_and_base_models_are_refused(save, make_llama):
    seeded = {"method": "ffa_lora", "random_seed": 1}
    one = save("one", 1, **seeded)
    model = PeftModel.from_pretrained(make_llama(), one)
    with pytest.raises(NdLoraValueError, match="random_seed=2, and 1 of the loaded"):
        hotswap_adapter(model, str(save("two", 2, **{**seeded, "random_seed": 2})), "default")
    with pytest.raises(NdLoraValueError, match="another base model than the loaded one"):
        hotswap_adapter(model, str(save("other", 2, make_llama(seed=4), **seeded)), "default")


def test_a_lora_and_a_merged_adapter_are_refused(save, make_llama, tmp_path):
    one = save("one", 1)
    model = PeftModel.from_pretrained(make_llama(), one)
    get_peft_model(make_llama(), LoraConfig()).save_pretrained(tmp_path / "lora")
    with pytest.raises(NdLoraValueError, match="is of type LORA"):
        hotswap_adapter(model, str(tmp_path / "lora"), "default")
    with pytest.raises(NdLoraValueError, match="of type none"):
        hotswap_adapter(model, str(one), "another")
    model.merge_adapter()
    with pytest.raises(NdLoraValueError, match="unmerge it first"):
        hotswap_adapter(model, str(one), "default")
