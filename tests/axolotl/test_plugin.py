"""The plugin inside Axolotl's own validation and loading, in this process."""

import warnings

import pytest

pytest.importorskip("axolotl")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import axolotl.utils.config as axolotl_config
    import torch
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.axolotl import implicit
from ndlora_plugins.integrations.axolotl.args import NdLoraBlock
from ndlora_plugins.integrations.axolotl.keys import YAML_KEYS
from ndlora_plugins.integrations.axolotl.plugin import NdLoraPlugin
from ndlora_plugins.integrations.peft.configuration.validation import fields_to_set
from ndlora_plugins.integrations.trl import NdLoraCallback

LEAST = {
    "base_model": "unused",
    "adapter": "ndlora",
    "datasets": [{"path": "unused", "type": "alpaca"}],
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "bf16": False,
}
# block, words of the message
WRONG_BLOCKS = [
    (
        {"methd": "slora"},
        ("ndlora.methd", "'method'", "anchor, options, num_modes, crossed_modes, modes, random_seed"),
    ),
    ({"r": 4}, ("ndlora.r", "`lora_r:`")),
    ({"lora_alpha": 4}, ("ndlora.lora_alpha", "`lora_alpha:`", "top level")),
    ({"init_lora_weights": "n_lora"}, ("`peft_init_lora_weights:`",)),
    ({"method": "loha"}, ("ndlora.method", "ndlinear", "slora", "nlora", "inttune")),
    ({"anchor": "loose"}, ("anchor", "snapshot", "none")),
    ({"num_modes": "many"}, ("num_modes", "integer")),
    ({"num_modes": 1}, ("num_modes", "at least 2")),
    ({"num_modes": True}, ("num_modes", "integer")),
    ({"crossed_modes": True}, ("crossed_modes", "integer")),
    ({"random_seed": [1]}, ("random_seed", "integer")),
    ({"modes": {"rows": [2]}}, ("modes", "in_modes")),
    ({"modes": {"in_modes": "68"}}, ("ndlora.modes", "in_modes")),
    ({"options": "equation"}, ("options", "dictionary")),
    (
        {"method": "slora", "options": {"size": 4}},
        ("ndlora.options", "{'size': ...}", "method='slora' has no such option; it has none"),
    ),
    (
        {"method": "ndlinear", "options": {"size": 4}},
        ("ndlora.options", "method='ndlinear' has no such option", "'num_modes', 'crossed_modes'"),
    ),
    ({"method": "einsum"}, ("ndlora.options", "equation")),
    (
        {"method": "einsum", "options": {"equation": "out r, r r in -> out in"}},
        ("equation=", "r"),
    ),
    ({"callback": {"loud": True}}, ("ndlora.callback", "loud", "strict")),
    ({"callback": {"export": "onnx"}}, ("onnx", "merged")),
]


@pytest.fixture(autouse=True)
def plugins_as_before():
    manager = PluginManager.get_instance()
    before = dict(manager.plugins)
    yield
    manager.plugins.clear()
    manager.plugins.update(before)


def validate(**keys):
    return axolotl_config.validate_config(DictDefault({**LEAST, **keys}))


def test_the_adapter_alone_brings_the_plugin_in():
    cfg = validate()
    assert cfg.plugins == [implicit.PLUGIN]
    assert PluginManager.get_instance().supports_adapter("ndlora")
    assert cfg.lora_r is None and cfg.ndlora is None


def test_other_plugins_stay_listed():
    other = "axolotl.integrations.spectrum.SpectrumPlugin"
    PluginManager.get_instance().register(other)
    assert validate(plugins=[other]).plugins == [other, implicit.PLUGIN]


def test_a_plugin_that_is_listed_is_not_added_again():
    path = "ndlora_plugins.integrations.axolotl.plugin.NdLoraPlugin"
    PluginManager.get_instance().register(path)
    assert validate(plugins=[path]).plugins == [path]


def test_activation_wraps_once():
    before = axolotl_config.validate_config
    implicit.activate()
    assert axolotl_config.validate_config is before


def test_other_adapters_are_left_alone():
    cfg = validate(adapter="lora", lora_r=8, lora_alpha=8, lora_target_linear=True)
    assert not cfg.plugins and cfg.adapter == "lora"


def test_a_block_without_the_adapter_is_refused():
    with pytest.raises(NdLoraValueError, match="adapter: lora"):
        validate(adapter="lora", lora_r=8, ndlora={"method": "slora"})


@pytest.mark.parametrize("block, words", WRONG_BLOCKS, ids=[str(w[0]) for w in WRONG_BLOCKS])
def test_a_wrong_block_is_named(block, words):
    with pytest.raises(ValueError) as caught:
        validate(ndlora=block)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_key_that_cannot_apply_is_refused_before_validation():
    with pytest.raises(NdLoraValueError, match="peft_use_dora"):
        validate(peft_use_dora=True)


def test_what_is_written_survives_validation():
    cfg = validate(
        lora_r=4,
        lora_exclude_modules=["o_proj"],
        peft_init_lora_weights="n_lora",
        ndlora={"anchor": "none", "modes": {"q_proj": {"in_modes": [4, 8]}}},
    )
    assert (cfg.lora_r, cfg.lora_exclude_modules, cfg.peft_init_lora_weights) == (4, ["o_proj"], "n_lora")
    assert cfg.ndlora.to_dict() == {"anchor": "none", "modes": {"q_proj": {"in_modes": [4, 8]}}}


def test_the_kernels_that_axolotl_turns_on_for_lora_stay_off():
    cfg = axolotl_config.validate_config(
        DictDefault(LEAST),
        capabilities={"n_gpu": 1, "bf16": True, "fp8": False, "tf32": False, "compute_capability": "sm_90"},
        env_capabilities={"torch_version": "2.13.0"},
    )
    assert not any(cfg[f"lora_{part}_kernel"] for part in ("mlp", "qkv", "o", "embedding"))


def test_a_validated_configuration_can_be_validated_again():
    once = validate(lora_r=2, ndlora={"method": "slora"})
    again = axolotl_config.validate_config(once)
    assert again.ndlora == once.ndlora and again.plugins == once.plugins


def load(tiny, config_only=False, **keys):
    cfg = validate(**keys)
    model = AutoModelForCausalLM.from_pretrained(tiny)
    return PluginManager.get_instance().load_adapter(model, cfg, config_only=config_only)


def test_an_option_of_a_method_reaches_the_adapter(tiny):
    equation = "out r, r s, s in -> out in"
    block = {"method": "einsum", "options": {"equation": equation, "sizes": {"s": 3}}}
    model, config = load(tiny, lora_r=2, ndlora=block)
    assert config.options == block["options"]
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    shapes = [tuple(factor.shape) for factor in layer.trained_parameters("default").values()]
    assert shapes == [(layer.out_features, 2), (2, 3), (3, layer.in_features)]


def test_the_block_has_every_option_that_axolotl_has_no_key_for():
    own = {field.name for field in fields_to_set(NdLoraConfig)} - set(YAML_KEYS)
    assert {*NdLoraBlock.model_fields} == {*own, "callback", "parameters"}


def test_targets_are_joined_with_all_linear_layers(tiny):
    model, config = load(tiny, lora_target_linear=True, lora_target_modules=["lm_head"])
    assert config.target_modules >= {"lm_head", "q_proj", "down_proj"}


def test_the_configuration_alone_for_preference_tuning(tiny):
    model, config = load(tiny, config_only=True, lora_r=2)
    assert model is None and config.r == 2 and config.peft_type == "NDLORA"


def test_a_saved_adapter_would_be_dropped_in_preference_tuning(tiny):
    with pytest.raises(NdLoraValueError, match="lora_model_dir.*merge-lora"):
        load(tiny, config_only=True, lora_model_dir="somewhere")


def test_the_plugin_keeps_out_of_other_adapters(tiny):
    assert NdLoraPlugin().load_adapter(None, DictDefault({"adapter": "lora"})) is None


def test_adapter_dtype_is_passed_on(tiny):
    cfg = validate(peft_autocast_adapter_dtype=False)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    model, _ = NdLoraPlugin().load_adapter(base, cfg)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("callback, added", [(None, 0), (False, 0), (True, 1), ({"log_norms": False}, 1)])
def test_the_callback_is_switched_on_by_its_key(callback, added):
    callbacks = NdLoraPlugin().add_callbacks_post_trainer(validate(ndlora={"callback": callback}), None)
    assert sum(isinstance(one, NdLoraCallback) for one in callbacks) == added


def test_a_saved_adapter_goes_on_training(tiny, tmp_path):
    model, _ = load(tiny, ndlora={"method": "slora"}, lora_r=2, peft_init_lora_weights=False)
    model.save_pretrained(tmp_path)
    again, config = load(tiny, lora_model_dir=str(tmp_path), lora_on_cpu=True)
    assert isinstance(again, PeftModel) and config.method == "slora"
    assert any(p.requires_grad for p in again.parameters())
    tokens = torch.arange(12)[None]
    assert torch.equal(again.eval()(tokens).logits, model.eval()(tokens).logits)


def test_options_that_differ_from_the_saved_adapter_are_named(tiny, tmp_path, caplog):
    load(tiny, lora_r=2)[0].save_pretrained(tmp_path)
    load(tiny, lora_r=4, ndlora={"num_modes": 3}, lora_model_dir=str(tmp_path))
    assert "lora_r: 4 (saved: 2)" in caplog.text and "ndlora.num_modes: 3 (saved: 2)" in caplog.text
    assert "lora_dropout" not in caplog.text


def test_an_adapter_of_another_kind_is_refused(tiny, tmp_path):
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig()).save_pretrained(tmp_path)
    with pytest.raises(NdLoraValueError, match="of type LORA.*NDLORA"):
        load(tiny, lora_model_dir=str(tmp_path))


def test_inference_without_an_adapter_warns(tiny, caplog):
    load(tiny, inference=True)
    assert "lora_model_dir is not set: inference uses a fresh adapter" in caplog.text
