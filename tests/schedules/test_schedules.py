"""Each schedule in real trainings of a tiny model: against its formula, LoRA's own training, and what is cut afterwards."""

import copy
import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.files.smaller import cut_adapter, prune_adapter
from ndlora_plugins.integrations.peft.layer import NdLoraLayer
from ndlora_plugins.integrations.trl import NdLoraCallback
from ndlora_plugins.registry import schedules

TARGETS = ["q_proj", "down_proj"]
# LoRA, as a method here
LORA = {"method": "einsum", "options": {"equation": "r in, out r -> out in"}}


def adapted(make_llama, **options):
    fields = {"method": "sora", "r": 4, "target_modules": TARGETS, "random_seed": 1, "task_type": "CAUSAL_LM"}
    return get_peft_model(make_llama(), NdLoraConfig(**fields | options))


def layers(model):
    return [module for module in model.modules() if isinstance(module, NdLoraLayer)]


def factors(model):
    return {key: value.detach().clone() for key, value in model.named_parameters() if "ndlora_" in key}


def loop(model, tokens, steps=6, rate=1e-2, kind=torch.optim.AdamW):
    """A training by hand."""
    model.train()
    optimizer = kind([value for value in model.parameters() if value.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        penalty = model.base_model.penalty()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        model.base_model.after_step(optimizer)
        optimizer.zero_grad()
    return losses


def trainer(model, tokens, path, *callbacks, **options):
    arguments = {
        "max_steps": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "weight_decay": 0.01,
        "seed": 3,
    }
    rows = [{"input_ids": row, "labels": row} for row in 16 * [tokens[0]]]
    return Trainer(
        model, TrainingArguments(path, **arguments | options), train_dataset=rows, callbacks=list(callbacks)
    )


# schedule -> (method, r, options of the schedule)
EACH = {
    "nested_rank": ("crossed", 3, {}),
    "ordered_dropout": ("slora", 4, {"tails": 1e-3}),
    "anneal_rank": ("sora", 4, {"to": 1, "first": 1, "every": 2}),
    "sparse_ranks": ("sora", 4, {"threshold": 0.05}),
    "group_lasso": ("tensor_train", 3, {"groups": "rank", "strength": 1e-2}),
    "keep_close": ("shared_core", 4, {"strength": 1.0}),
    "reorthogonalise": ("slora", 4, {"every": 2}),
}


def test_each_schedule_is_trained_below():
    assert set(EACH) == {name for name, found in schedules().items() if found.plugin == "ndlora-plugins"}


@pytest.mark.parametrize("name", EACH)
def test_by_hand_and_with_the_callback_it_is_the_same_training(name, make_llama, tokens, tmp_path, no_warnings):
    method, rank, options = EACH[name]
    by_hand = adapted(make_llama, method=method, r=rank)
    by_hand.base_model.set_schedules({name: options})
    by_hand.base_model.clock.step = -1  # a loop's first forward is step 1
    losses = loop(by_hand, tokens[:1])
    assert losses[-1] < losses[0]

    model = adapted(make_llama, method=method, r=rank)
    trained = trainer(model, tokens, tmp_path, NdLoraCallback(schedules={name: options}))
    trained.train()
    torch.testing.assert_close(factors(model), factors(by_hand), rtol=2e-3, atol=2e-4)
    assert model.peft_config["default"].schedules == {name: options}
    model.save_pretrained(tmp_path / "adapter")
    logits = model.eval()(tokens).logits
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(tokens).logits, logits)


@pytest.mark.parametrize("name", EACH)
def test_a_resumed_training_goes_on_equally(name, make_llama, tokens, tmp_path):
    method, rank, options = EACH[name]
    found = []
    for directory, resumed in (("whole", None), ("again", str(tmp_path / "whole/checkpoint-3"))):
        model = adapted(make_llama, method=method, r=rank)
        training = trainer(
            model, tokens, tmp_path / directory, NdLoraCallback(schedules={name: options}),
            save_strategy="steps", save_steps=3,
        )  # fmt: skip
        training.train(resume_from_checkpoint=resumed)
        found.append(factors(model))
    torch.testing.assert_close(*found, rtol=0, atol=0)
