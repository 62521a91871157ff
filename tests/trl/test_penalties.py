"""What a method asks for beside the loss, through a trainer and in a loop of one's own; and after a resume."""

import warnings
from dataclasses import replace

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraValueError, NdLoraWarning
from ndlora_plugins.integrations.peft import measure_gradients
from ndlora_plugins.integrations.peft.tuner.schedules import add_penalty_gradients, after_step
from ndlora_plugins.integrations.trl import NdLoraCallback
from ndlora_plugins.integrations.trl.checks import adapted_layers
from ndlora_plugins.schedules import Ranks, Schedule

UNASKED = (
    "schedules=['strange_penalty'] ask for a penalty or for a change after each step, and nothing does it"
)


def soft_threshold(options, training):
    for layer in training.layers:
        for value in layer.trained.values():
            value.copy_(value.sign() * (value.abs() - 30 * layer.rate).clamp(min=0))


SHRINK = Schedule(name="strange_shrink", summary="", source="", after_step=soft_threshold)


def shared_lasso(plugin):
    """The method with one "down" for all layers of a shape."""

    def key(factor, layer, layout):
        return f"down_{layout.out_features}x{layout.in_features}" if factor.name == "down" else None

    return replace(plugin.method, name="shared_lasso", shared=key)


@pytest.fixture(autouse=True)
def lasso(stranger):
    """A group penalty, the same with shared sides, and a method that shrinks after every step."""
    plugin = stranger("group_penalty")
    stranger(shared_lasso(plugin))
    stranger(SHRINK)
    stranger(replace(plugin.method, name="shrinking", schedules=("strange_shrink",)))
    return plugin


def config(method="strange_lasso", **options):
    return NdLoraConfig(
        method=method, **{"r": 4, "target_modules": ["q_proj", "o_proj"], "random_seed": 1} | options
    )


def gradients(model):
    return {key: value.grad for key, value in model.named_parameters() if value.grad is not None}


def factors(model):
    return {key: value.detach().clone() for key, value in model.named_parameters() if "ndlora_" in key}


@pytest.mark.parametrize("method", ["strange_lasso", "shared_lasso"])
def test_the_gradient_is_that_of_loss_and_penalty(method, make_llama, tokens, shake):
    found = []
    for added in (False, True):
        model = get_peft_model(
            make_llama(dtype=torch.float64), config(method), autocast_adapter_dtype=False
        ).double()
        shake(model)
        loss = model(tokens, labels=tokens).loss
        if added:
            loss = loss + model.base_model.penalty()
        loss.backward()
        if not added:
            alone = {key: value.clone() for key, value in gradients(model).items()}
            add_penalty_gradients(model)
        found.append(gradients(model))
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-15)
    assert not any(torch.equal(alone[key], found[0][key]) for key in alone)


# what is done with a model that has the adapters "default", which is active, and "other" -> whose factors get a penalty
STATES = [
    (lambda model: None, ["default"]),
    (lambda model: model.set_adapter("other"), ["other"]),
    (lambda model: model.base_model.set_adapter(["default", "other"]), ["default", "other"]),
    (lambda model: model.set_requires_grad("default", False), []),
    (lambda model: model.set_adapter("other", inference_mode=True), []),
    (lambda model: model.base_model.disable_adapter_layers(), []),
]


@pytest.mark.parametrize("method", ["strange_lasso", "shared_lasso"])
@pytest.mark.parametrize("change, expected", STATES)
def test_only_what_trains_gets_one(change, expected, method, make_llama, shake):
    model = get_peft_model(make_llama(), config(method))
    model.add_adapter("other", config(method))
    shake(model)
    change(model)
    add_penalty_gradients(model)
    assert {name for name in model.peft_config for key in gradients(model) if f".{name}." in key} == set(
        expected
    )
    total = model.base_model.penalty()
    assert (total is None) == (not expected)


def training(model, tokens, tmp_path, *callbacks, **options):
    arguments = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 3,
    }
    rows = [
        {"input_ids": row, "labels": row} for row in (tokens.repeat(8, 1) + torch.arange(16)[:, None]) % 100
    ]
    return Trainer(
        model,
        TrainingArguments(tmp_path, **arguments | options),
        train_dataset=rows,
        callbacks=list(callbacks),
    )


class Own(Trainer):
    """A trainer whose loss has the penalty."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss = super().compute_loss(model, inputs, **kwargs)
        return loss + self.accelerator.unwrap_model(model).base_model.penalty()


@pytest.mark.parametrize("method", ["strange_lasso", "shared_lasso"])
def test_a_training_with_the_callback_is_one_with_the_penalty_in_the_loss(
    method, make_llama, tokens, tmp_path
):
    found = []
    for own in (False, True):
        model = get_peft_model(make_llama(), config(method))
        trainer = training(model, tokens, tmp_path, *(() if own else [NdLoraCallback()]), max_grad_norm=0.0)
        if own:
            trainer.__class__ = Own
        trainer.train()
        found.append(factors(model))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    plain = get_peft_model(make_llama(), config("slora"))
    assert plain.base_model.penalty() is None


class Count(TrainerCallback):
    """Counts what the optimizer and the clock do."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(next(layer.clock.step for _, layer in adapted_layers(model)))


def test_under_accumulation_once_a_step(make_llama, tokens, tmp_path, lasso, stranger):
    asked, moments = [], []

    def penalty(options, training):
        asked.extend(training.layers)
        return lasso.schedule.penalty(options, training)

    def ranks(options, moment, place):
        moments.append(moment)
        return Ranks(place.rank)

    stranger(replace(lasso.schedule, name="asking", penalty=penalty, ranks=ranks))
    stranger(replace(lasso.method, name="asked", schedules=("asking",)))
    model = get_peft_model(make_llama(), config("asked"))
    count = Count()
    training(
        model, tokens, tmp_path, NdLoraCallback(), count, per_device_train_batch_size=1,
        gradient_accumulation_steps=3, max_steps=4,
    ).train()  # fmt: skip
    assert len(asked) == 4 * 4  # layers x steps
    assert count.steps == [0, 1, 2, 3]
    seen = [moment.step for moment in moments]
    # in each of three forwards every layer sees the step
    assert seen == sorted(seen) and {step: seen.count(step) for step in seen} == dict.fromkeys(
        range(4), len(seen) // 4
    )
    assert {moment.seed for moment in moments} == {1}
    assert not next(layer.clock.driven for _, layer in adapted_layers(model))


def test_a_proximal_step_makes_exact_zeros(make_llama, tokens, tmp_path):
    model = get_peft_model(make_llama(), config("shrinking"))
    training(
        model,
        tokens,
        tmp_path,
        NdLoraCallback(),
        lr_scheduler_type="constant",
        learning_rate=1e-3,
        max_steps=6,
    ).train()
    downs = [value for key, value in factors(model).items() if key.endswith("down")]
    zeros = sum(int((value == 0).sum()) for value in downs) / sum(value.numel() for value in downs)
    # Kaiming's bound is 1 / sqrt(48) = 0.14, and six steps take 0.03 each
    assert 0.5 < zeros


@pytest.mark.parametrize("frozen", [False, True])
def test_it_has_the_factors_own_learning_rate(frozen, make_llama, shake):
    model = shake(get_peft_model(make_llama(), config("shrinking")), scale=1.0)
    if frozen:
        model.set_requires_grad("default", False)
    before = factors(model)
    trained = [value for value in model.parameters() if value.requires_grad]
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 9.0}, {"params": trained, "lr": 0.01}]
    after_step(model, torch.optim.SGD(groups[: 1 if frozen else 2]))
    for key, value in factors(model).items():
        expected = before[key] if frozen else before[key].sign() * (before[key].abs() - 0.3).clamp(min=0)
        torch.testing.assert_close(value, expected)


def own_loop(model, tokens, adds_penalty):
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=0.1)
    for _ in range(4):
        loss = model(tokens, labels=tokens).loss
        if adds_penalty:
            loss = loss + model.base_model.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def injected(model, chosen):
    return inject_adapter_in_model(chosen, model)


@pytest.mark.parametrize("adapt", [get_peft_model, injected])
def test_a_loop_without_it_is_told_once(adapt, make_llama, tokens):
    model = adapt(make_llama(), config()).train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        own_loop(model, tokens, adds_penalty=False)
    messages = [str(warning.message) for warning in caught if warning.category is NdLoraWarning]
    assert len(messages) == 1 and messages[0].startswith(UNASKED)


def test_a_loop_with_it_is_not_told(make_llama, tokens, no_warnings):
    own_loop(get_peft_model(make_llama(), config()).train(), tokens, adds_penalty=True)


@pytest.mark.parametrize("adapt", [get_peft_model, injected])
def test_the_callback_adds_it_with_and_without_a_peft_model(adapt, make_llama, tokens, tmp_path, no_warnings):
    found = []
    for method in ("strange_lasso", "shrinking"):
        model = adapt(make_llama(), config(method))
        training(model, tokens, tmp_path, NdLoraCallback()).train()
        found.append(factors(model))
    assert found[0].keys() == found[1].keys()
    # nothing of evaluation
    model.eval()
    model(tokens)


def test_half_precision_without_clipping_is_refused(make_llama, tokens, tmp_path):
    model = get_peft_model(make_llama(), config())
    trainer = training(model, tokens, tmp_path, max_grad_norm=0.0)
    trainer.args.fp16 = True
    with pytest.raises(NdLoraValueError, match="Penalties on factors do not work with fp16 without clipping"):
        NdLoraCallback().on_train_begin(trainer.args, trainer.state, trainer.control, model=model)


# method, the file of tests/strangers that brings it, gradient checkpointing
RESUMED = [
    ("shared_lasso", None, False),
    ("shared_lasso", None, True),
    ("shrinking", None, False),
    ("strange_dylora", "dylora", True),
    ("strange_sb", "lora_sb", False),
    ("strange_xs", "lora_xs", False),
]


@pytest.mark.parametrize("method, file, checkpointing", RESUMED)
def test_a_resumed_training_is_the_same_bit_for_bit(
    method, file, checkpointing, make_llama, tokens, tmp_path, stranger
):
    if file is not None:
        stranger(file)
    trainers = []
    for directory, resumed in (("whole", None), ("again", str(tmp_path / "whole/checkpoint-2"))):
        base, chosen = make_llama(), config(method)
        measure_gradients(base, chosen, lambda base=base: base(tokens, labels=tokens).loss.backward())
        trainer = training(
            get_peft_model(base, chosen), tokens, tmp_path / directory, NdLoraCallback(), save_strategy="steps",
            save_steps=2, gradient_checkpointing=checkpointing,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resumed)
        trainers.append(trainer)
    wanted, found = (factors(trainer.model) for trainer in trainers)
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[key], found[key]) for key in wanted)
    losses = [
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in trainers
    ]
    assert losses[0] == losses[1]
