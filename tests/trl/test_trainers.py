"""TRL's other trainers and transformers' own: two steps each under the callback, saved and loaded."""

import math

import pytest
import torch
from representative import each

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.integrations.trl import NdLoraCallback

pytest.importorskip("trl")
pytestmark = pytest.mark.slow

# method -> NdLoraConfig's arguments, from a start that moves the model
MOVED = {
    "crossed": {"r": 2, "init_lora_weights": False},
    "ndlinear": {"method": "ndlinear", "r": 2, "init_lora_weights": False},
    "slora": {"method": "slora", "r": 4, "init_lora_weights": False},
    "nlora": {"init_lora_weights": "n_lora", "r": 4, "anchor": "none"},
    "inttune": {"method": "inttune", "r": 8, "anchor": "none"},
}
# trainer (its configuration is named alike) -> form of the data, task, further arguments of the configuration
TRAINERS = {
    "DPOTrainer": ("preference", "CAUSAL_LM", {"max_length": 64}),
    "KTOTrainer": ("unpaired", "CAUSAL_LM", {"max_length": 64}),
    "RewardTrainer": ("preference", "SEQ_CLS", {"max_length": 256}),
    "GRPOTrainer": ("prompt", "CAUSAL_LM", {"num_generations": 4, "max_completion_length": 8, "beta": 0.1}),
}
# those that keep a frozen copy of a trained adapter as their reference
REFERENCE = {name: TRAINERS[name] for name in ("DPOTrainer", "GRPOTrainer")}


def share_of_short_words(completions, **kwargs):
    """A reward for GRPO that differs between completions."""
    return [sum(character in "aeiou .," for character in text) / (len(text) + 1) for text in completions]


@pytest.fixture
def make_trainer(base, tokenizer, datasets_by_form, options):
    """Function (trainer's name, model, ...) -> the trainer, two steps ahead of it."""
    import trl

    def make(name, form, task, more, **arguments):
        config = getattr(trl, name.replace("Trainer", "Config"))
        if name == "GRPOTrainer":
            arguments["reward_funcs"] = share_of_short_words
        return getattr(trl, name)(
            args=config(**{**options, "max_steps": 2, **more}),
            train_dataset=datasets_by_form[form],
            processing_class=tokenizer,
            callbacks=[NdLoraCallback()],
            **arguments,
        )

    return make


@pytest.fixture
def model_for(base):
    """Function from a task to the base model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    def load(task):
        torch.manual_seed(5)  # of the score head
        if task == "SEQ_CLS":
            return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    return load


def outputs_of(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 20, 33, 47]])).logits


@pytest.mark.step("train, save, load")
@pytest.mark.parametrize("host", TRAINERS)
def test_trains_saves_and_loads(host, method, make_trainer, model_for, fingerprint, losses, tmp_path):
    from peft import PeftModel

    form, task, more = TRAINERS[host]
    config = NdLoraConfig(task_type=task, random_seed=1, **method)
    trainer = make_trainer(host, form, task, more, model=model_for(task), peft_config=config)
    trainer.train()
    assert len(losses(trainer)) == 2 and all(map(math.isfinite, losses(trainer)))
    assert trainer.state.log_history[1]["ndlora/default/update_norm"] > 0
    assert fingerprint(trainer.model) == fingerprint(model_for(task))
    trainer.save_model(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(model_for(task), tmp_path / "adapter")
    assert torch.equal(outputs_of(reloaded), outputs_of(trainer.model))
    assert not torch.equal(outputs_of(reloaded), outputs_of(model_for(task)))


@pytest.mark.step("a trained adapter as its own reference")
@pytest.mark.parametrize("host", REFERENCE)
def test_a_trained_adapter_becomes_the_reference(host, method, make_trainer, model_for):
    from peft import get_peft_model

    form, task, more = REFERENCE[host]
    trained = get_peft_model(model_for(task), NdLoraConfig(task_type=task, random_seed=1, **method))
    with torch.no_grad():
        for key, parameter in trained.named_parameters():
            if "ndlora_factors" in key:
                parameter.add_(0.05 * torch.randn_like(parameter))
    before = outputs_of(trained)
    trainer = make_trainer(host, form, task, more, model=trained)
    assert sorted(trainer.model.peft_config) == ["default", "ref"]
    trainer.train()
    assert not torch.equal(outputs_of(trainer.model), before)
    trainer.model.set_adapter("ref")
    assert torch.equal(outputs_of(trainer.model), before)


@pytest.mark.step("get_peft_model and add_adapter train alike", host="Trainer")
@pytest.mark.usefixtures("transformers_adapters")
def test_plain_trainer_with_peft_and_with_transformers_mixin(method, model, options, losses):
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": list(range(5 + i, 25 + i)), "labels": list(range(5 + i, 25 + i))} for i in range(8)]
    config = NdLoraConfig(random_seed=1, target_modules="all-linear", **method)
    arguments = TrainingArguments(**{**options, "max_steps": 2})
    first = Trainer(
        get_peft_model(model, config), arguments, train_dataset=rows, callbacks=[NdLoraCallback()]
    )
    first.train()
    plain = first.model.unload()
    plain.add_adapter(config, adapter_name="mixin")
    second = Trainer(plain, arguments, train_dataset=rows, callbacks=[NdLoraCallback()])
    second.train()
    assert losses(second) == losses(first)
    assert second.state.log_history[0]["ndlora/mixin/update_norm"] > 0


@pytest.mark.step("what TRL hands to vLLM (which was not run)", host="GRPOTrainer")
@pytest.mark.parametrize("method", [MOVED[name] for name in each(MOVED)], ids=each(MOVED))
def test_what_trl_hands_to_vllm_is_the_merged_model(method, model):
    # names as in github.com/huggingface/trl, trl/generation/vllm_generation.py, `_iter_named_params`
    from peft import get_peft_model

    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    adapted = get_peft_model(model, NdLoraConfig(**method))
    expected = outputs_of(adapted)
    adapted.merge_adapter()
    handed = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter.data.clone()
        for name, parameter in adapted.named_parameters()
        if adapted.prefix not in name and "original_module" not in name
    }
    adapted.unmerge_adapter()
    assert handed.keys() == weights.keys()
    torch.testing.assert_close(outputs_of(adapted), expected)
    model = adapted.unload()
    model.load_state_dict(handed, strict=False)
    torch.testing.assert_close(outputs_of(model), expected)
