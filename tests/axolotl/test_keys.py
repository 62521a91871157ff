"""Axolotl's keys to NdLoraConfig's fields, without Axolotl."""

from types import SimpleNamespace

import pytest

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import MissingExtraError, NdLoraValueError
from ndlora_plugins.integrations import axolotl
from ndlora_plugins.integrations.axolotl.keys import (
    REFUSED,
    YAML_KEYS,
    build_config,
    refuse_what_cannot_apply,
)

# key of the YAML, value, field of NdLoraConfig, value there
MAPPED = [
    ("lora_r", 4, "r", 4),
    ("lora_alpha", 16, "lora_alpha", 16),
    ("lora_dropout", 0.1, "lora_dropout", 0.1),
    ("lora_target_modules", ["q_proj", "v_proj"], "target_modules", {"q_proj", "v_proj"}),
    ("lora_target_modules", "all-linear", "target_modules", "all-linear"),
    ("lora_target_modules", r".*\.q_proj", "target_modules", r".*\.q_proj"),
    ("lora_target_linear", True, "target_modules", "all-linear"),
    ("lora_target_linear", False, "target_modules", None),
    ("lora_target_parameters", ["mlp.experts.down_proj"], "target_parameters", ["mlp.experts.down_proj"]),
    ("lora_exclude_modules", ["lm_head"], "exclude_modules", {"lm_head"}),
    ("lora_modules_to_save", ["embed_tokens"], "modules_to_save", ["embed_tokens"]),
    ("lora_modules_to_save", [], "modules_to_save", None),
    ("lora_fan_in_fan_out", True, "fan_in_fan_out", True),
    ("lora_rank_pattern", {"q_proj": 2}, "rank_pattern", {"q_proj": 2}),
    ("lora_alpha_pattern", {"q_proj": 2}, "alpha_pattern", {"q_proj": 2}),
    ("peft_layers_to_transform", [0, 1], "layers_to_transform", [0, 1]),
    ("peft_init_lora_weights", "n_lora", "init_lora_weights", "n_lora"),
    ("peft_init_lora_weights", "s_lora", "method", "slora"),
    ("peft_init_lora_weights", False, "init_lora_weights", False),
    ("peft_use_rslora", True, "use_rslora", True),
    ("peft_trainable_token_indices", [1, 2], "trainable_token_indices", [1, 2]),
    ("peft_ensure_weight_tying", True, "ensure_weight_tying", True),
    ("ndlora", {"method": "inttune"}, "method", "inttune"),
    ("ndlora", {"num_modes": 3}, "num_modes", 3),
    ("ndlora", {"crossed_modes": 4}, "crossed_modes", 4),
    ("ndlora", {"modes": {"in_modes": [4, 8]}}, "modes", {"in_modes": [4, 8]}),
    ("ndlora", {"options": {"num_modes": 3}}, "options", {"num_modes": 3}),
    ("ndlora", {"random_seed": 7}, "random_seed", 7),
    ("ndlora", {"bias": "all"}, "bias", "all"),
]
# key, value, a word of what to do
REFUSALS = [
    ("peft_use_dora", True, "take it out"),
    ("peft", {"loftq_config": {"loftq_bits": 4}}, "n_lora"),
    ("peft_layer_replication", [[0, 1]], "replicate them before"),
    ("lora_mlp_kernel", True, "false"),
    ("lora_qkv_kernel", True, "false"),
    ("lora_o_kernel", True, "false"),
    ("lora_embedding_kernel", True, "false"),
    ("flash_attn_fuse_mlp", True, "take it out"),
    ("use_onebitllms", True, "take it out"),
    ("relora", True, "take it out"),
    ("loraplus_lr_ratio", 16.0, "learning_rate"),
    ("qlora_sharded_model_loading", True, "take it out"),
    ("gptq", True, "load_in_4bit"),
    ("nvfp4_merge_aware", True, "take it out"),
    ("quantize_moe_experts", True, "take it out"),
    ("expert_parallel_size", 2, "take it out"),
    ("trl", {"vllm_lora_sync": True}, "take it out"),
    ("trl", {"async_prefetch": True}, "take it out"),
    ("trl", {"use_data_producer": True}, "take it out"),
    ("lora_rr", 8, "did you mean `lora_r`"),
    ("peft_use_something_new", True, "no key that adapter: ndlora knows"),
]
# keys, the two names in the message
TOGETHER = [
    ({"load_in_4bit": True, "load_in_8bit": True}, ("load_in_4bit", "load_in_8bit")),
    ({"load_in_4bit": True, "fsdp_config": {"reshard_after_forward": True}}, ("load_in_4bit", "fsdp_config")),
]
# keys, field with its YAML name in the message
WRONG = [
    ({"lora_r": 0}, "lora_r"),
    ({"lora_dropout": 1.5}, "lora_dropout"),
    ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
    ({"lora_target_modules": "("}, "target_modules is lora_target_modules"),
    ({"lora_rank_pattern": {"q_proj": "2"}}, "rank_pattern is lora_rank_pattern"),
    ({"peft_use_rslora": "false"}, "use_rslora is peft_use_rslora"),
    ({"ndlora": {"random_seed": [1]}}, "ndlora.random_seed"),
    ({"ndlora": {"modes": {"in_modes": "68"}}}, "ndlora.modes"),
    ({"ndlora": {"method": "loha"}}, "ndlora.method"),
    ({"ndlora": {"num_modes": 1}}, "ndlora.num_modes"),
    ({"ndlora": {"crossed_modes": 0}}, "ndlora.crossed_modes"),
    ({"ndlora": {"options": {"size": 4}}}, "ndlora.options"),
    ({"ndlora": {"parameters": "1M"}, "lora_r": 8}, "r is lora_r"),
    ({"ndlora": {"parameters": "1M", "method": "slora"}}, "method is ndlora.method"),
    ({"peft_init_lora_weights": "pissa"}, "peft_init_lora_weights"),
    ({"peft_init_lora_weights": "s_lora", "ndlora": {"method": "inttune"}}, "peft_init_lora_weights"),
]


def validated(**keys):
    """As Axolotl's dicts: any attribute, None where it is missing."""

    class Keys(SimpleNamespace):
        def __getattr__(self, name):
            return None

    return Keys(**keys)


def test_a_budget_chooses_the_method():
    from transformers import LlamaConfig

    from ndlora_plugins.integrations.peft.skeleton import model_on_meta
    from ndlora_plugins.integrations.peft.tuner.targets import plan_model

    model = model_on_meta(
        LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=16)
    )
    config = build_config(validated(ndlora={"parameters": "2k"}), model)
    assert 1960 <= sum(plan.num_parameters for _, plan in plan_model(model, config)) <= 2000
    assert build_config(validated(ndlora={"parameters": "2k"})).method == NdLoraConfig().method


@pytest.mark.parametrize("key, value, field, expected", MAPPED, ids=[f"{m[0]}={m[1]}" for m in MAPPED])
def test_a_key_becomes_its_field(key, value, field, expected):
    assert getattr(build_config(validated(**{key: value})), field) == expected


def test_every_key_of_the_table_is_mapped_by_a_test():
    assert set(YAML_KEYS.values()) - {"peft_layers_pattern"} <= {case[0] for case in MAPPED}


def test_layers_pattern_goes_with_layers_to_transform():
    config = build_config(validated(peft_layers_pattern=["layers"], peft_layers_to_transform=[0]))
    assert config.layers_pattern == ["layers"]


def test_nothing_said_is_our_defaults():
    config = build_config(validated())
    assert (config.method, config.r, config.lora_alpha, config.num_modes) == ("crossed", 1, 8, 2)
    assert build_config(validated(ndlora={"method": "nlora"})).r == 8


def test_the_task_follows_from_the_model():
    model = type("LlamaForSequenceClassification", (), {})()
    assert build_config(validated(), model).task_type == "SEQ_CLS"
    assert build_config(validated(), object()).task_type == "CAUSAL_LM"


@pytest.mark.parametrize("key, value, what_to_do", REFUSALS, ids=[str(r[0]) + str(r[1]) for r in REFUSALS])
def test_a_key_that_cannot_apply_is_refused(key, value, what_to_do):
    name = key if not isinstance(value, dict) else f"{key}.{next(iter(value))}"
    with pytest.raises(NdLoraValueError) as caught:
        refuse_what_cannot_apply({"adapter": "ndlora", key: value})
    assert f"`{name}: " in str(caught.value)
    assert what_to_do in str(caught.value)


def test_every_refusal_is_tested():
    tested = {
        case[0] if not isinstance(case[1], dict) else f"{case[0]}.{next(iter(case[1]))}" for case in REFUSALS
    }
    assert set(REFUSED) <= tested


@pytest.mark.parametrize("keys, names", TOGETHER)
def test_keys_that_cannot_stand_together(keys, names):
    with pytest.raises(NdLoraValueError) as caught:
        refuse_what_cannot_apply({"adapter": "ndlora", **keys})
    assert all(name in str(caught.value) for name in names)


def test_every_wrong_key_is_named_at_once():
    with pytest.raises(NdLoraValueError, match="(?s)peft_use_dora.*relora"):
        refuse_what_cannot_apply({"peft_use_dora": True, "relora": True})


def test_what_says_nothing_is_not_refused():
    refuse_what_cannot_apply(
        {
            "lora_mlp_kernel": False,
            "peft_use_dora": None,
            "relora": False,
            "peft": {"loftq_config": None},
            "expert_parallel_size": 1,
            "trl": {"beta": 0.1},
            "loraplus_lr_embedding": 1e-6,
            "lora_r": 8,
        }
    )


@pytest.mark.parametrize("keys, name", WRONG, ids=[str(w[0]) for w in WRONG])
def test_a_wrong_value_is_named_as_in_the_yaml(keys, name):
    with pytest.raises(NdLoraValueError) as caught:
        build_config(validated(**keys))
    assert name in str(caught.value)


@pytest.mark.parametrize("name", axolotl.__all__)
def test_without_axolotl_the_names_say_which_extra_is_missing(monkeypatch, name):
    monkeypatch.setattr(axolotl, "find_spec", lambda package: None)
    with pytest.raises(MissingExtraError, match=r"ndlora-plugins\[axolotl\]"):
        getattr(axolotl, name)
