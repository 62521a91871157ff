"""Each schedule in real trainings of a tiny model: against its formula, LoRA's own training, and cuts."""

import re

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.adapters.smaller import cut_adapter, prune_adapter
from ndlora_plugins.integrations.peft.layers.layer import NdLoraLayer
from ndlora_plugins.integrations.trl import NdLoraCallback
from ndlora_plugins.registry import schedules

TARGETS = ["q_proj", "down_proj"]


def adapted(make_llama, **options):
    fields = {"method": "sora", "r": 4, "target_modules": TARGETS, "random_seed": 1, "task_type": "CAUSAL_LM"}
    return get_peft_model(make_llama(), NdLoraConfig(**fields | options))


def layers(model):
    return [module for module in model.modules() if isinstance(module, NdLoraLayer)]


def factors(model):
    return {key: value.detach().clone() for key, value in model.named_parameters() if "ndlora_" in key}


def loop(model, tokens, steps=4, rate=1e-2, kind=torch.optim.AdamW):
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
        "max_steps": 4,
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
def test_by_hand_and_with_the_callback_it_is_the_same_training(
    name, make_llama, tokens, tmp_path, no_warnings
):
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


# what a step changes hangs on the step, on what was drawn, or on what the optimizer knows
@pytest.mark.parametrize("name", ["nested_rank", "ordered_dropout", "anneal_rank", "reorthogonalise"])
def test_a_resumed_training_goes_on_equally(name, make_llama, tokens, tmp_path):
    method, rank, options = EACH[name]
    found = []
    for directory, resumed in (("whole", None), ("again", str(tmp_path / "whole/checkpoint-2"))):
        model = adapted(make_llama, method=method, r=rank)
        training = trainer(
            model, tokens, tmp_path / directory, NdLoraCallback(schedules={name: options}),
            save_strategy="steps", save_steps=2,
        )  # fmt: skip
        training.train(resume_from_checkpoint=resumed)
        found.append(factors(model))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_resume_with_other_schedules_is_refused(make_llama, tokens, tmp_path):
    for given, resumed in (({}, None), ({"least": 2}, str(tmp_path / "checkpoint-2"))):
        model = adapted(make_llama)
        training = trainer(
            model, tokens, tmp_path, NdLoraCallback(schedules={"nested_rank": given}), save_strategy="steps",
            save_steps=2,
        )  # fmt: skip
        if resumed is None:
            training.train()
            continue
        with pytest.raises(NdLoraValueError, match="the checkpoint of step 2 was trained with schedules="):
            training.train(resume_from_checkpoint=resumed)


def lora(model):
    """PEFT's LoRA with the start of an adapter of ours: ours goes on from it."""
    config = LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    found = get_peft_model(model, config)
    return found


def test_dylora_that_always_sees_every_rank_is_loras_training(make_llama, tokens):
    ours = adapted(make_llama, lora_alpha=4, schedules={"nested_rank": {"least": 4, "learn": "all"}})
    theirs = lora(make_llama())
    with torch.no_grad():
        for layer in layers(ours):
            other = theirs.get_submodule(f"base_model.model.{layer.name}")
            other.lora_A["default"].weight.copy_(layer.ndlora_factors["default"]["down"])
            other.lora_B["default"].weight.copy_(layer.ndlora_factors["default"]["up"])
            layer.ndlora_factors["default"]["core"].requires_grad_(False)
    loop(ours, tokens)
    theirs.train()
    optimizer = torch.optim.AdamW([value for value in theirs.parameters() if value.requires_grad], lr=1e-2)
    for _ in range(4):
        theirs(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(ours.eval()(tokens).logits, theirs.eval()(tokens).logits, rtol=1e-4, atol=1e-5)


# scale of nested_rank -> the scaling of the first b of 4 ranks, of one that is 3 for all of them
SCALES = {"rank": lambda b: 3 * 4 / b, "root": lambda b: 3 * (4 / b) ** 0.5, "none": lambda b: 3.0}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", ["sora", "crossed", "slora", "tensor_train"])
def test_what_is_cut_is_what_a_training_forward_saw(method, scale, make_llama, tokens, shake, tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    model = adapted(
        make_llama, method=method, lora_alpha=12, schedules={"nested_rank": {"scale": scale}},
        rank_pattern={"down_proj": 2},
    )  # fmt: skip
    shake(model).save_pretrained(tmp_path / "adapter")
    model.train()
    for step in range(1, 40):
        model.base_model.clock.step = step - 1
        seen = model(tokens).logits
        rank = model.base_model.clock.ranks("default", layers(model)[0].name)
        if rank is None or rank.seen == 4 or (tmp_path / f"cut-{rank.seen}").exists():
            continue
        report = cut_adapter(tmp_path / "adapter", tmp_path / f"cut-{rank.seen}", rank.seen)
        loaded = PeftModel.from_pretrained(make_llama(), tmp_path / f"cut-{rank.seen}").eval()
        torch.testing.assert_close(loaded(tokens).logits, seen, rtol=1e-4, atol=1e-5)
        assert layers(loaded)[0].scaling["default"] == pytest.approx(SCALES[scale](rank.seen))
        assert report.largest_error > 0
    assert len(list(tmp_path.glob("cut-*"))) == 3


def test_what_annealing_left_is_pruned_without_loss(make_llama, tokens, tmp_path):
    model = adapted(make_llama, schedules={"anneal_rank": {"to": 2, "first": 2, "every": 1}})
    loop(model, tokens)
    model.save_pretrained(tmp_path / "adapter")
    report = prune_adapter(tmp_path / "adapter", tmp_path / "pruned")
    assert {layer.rank for layer in report.layers} == {2} and report.largest_error == 0
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "pruned").eval()
    torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits, rtol=1e-4, atol=1e-5)


def test_closed_gates_are_pruned_without_loss(make_llama, tokens, tmp_path, shake):
    model = shake(adapted(make_llama, schedules={"sparse_ranks": {"threshold": 0.4}}), scale=0.5)
    loop(model, tokens, steps=2)
    gates = torch.stack([layer.ndlora_factors["default"]["core"] for layer in layers(model)])
    left = dict(zip((layer.name for layer in layers(model)), (gates != 0).sum(1).tolist(), strict=True))
    assert 0 < sum(left.values()) < gates.numel()
    model.save_pretrained(tmp_path / "adapter")
    report = prune_adapter(tmp_path / "adapter", tmp_path / "pruned")
    assert {layer.name: layer.rank for layer in report.layers} == left
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path / "pruned").eval()
    torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits, rtol=1e-4, atol=1e-5)


# groups, a strength that takes a part of the groups to zero
@pytest.mark.parametrize("groups", ["block", "layer", "matrix", "rank"])
def test_the_proximal_step_takes_whole_groups_to_zero(groups, make_llama, shake):
    model = shake(adapted(make_llama), scale=0.1)
    layer = layers(model)[0]
    with torch.no_grad():
        for value in layer.trained_parameters("default").values():
            value.mul_(1e-3)
    model.base_model.set_schedules({"group_lasso": {"groups": groups, "proximal": True, "strength": 10}})
    norms = {name: value.norm() for name, value in layer.trained_parameters("default").items()}
    model.base_model.after_step(torch.optim.SGD(model.parameters(), lr=1e-2))
    gone = {name: not value.any() for name, value in layer.trained_parameters("default").items()}
    # the other layer of its block is large
    assert set(gone.values()) == {groups != "block"} and min(norms.values()) > 0
    assert all(value.any() for value in layers(model)[1].trained_parameters("default").values())


# schedule, method, fields besides
SAME_UPDATE = [
    ("reorthogonalise", {"method": "slora"}),
    ("reorthogonalise", {"method": "sora"}),
    ("reorthogonalise", {"method": "ffa_lora", "save_frozen": True}),
    ("anneal_rank", {"method": "slora"}),
]


@pytest.mark.parametrize("name, fields", SAME_UPDATE)
def test_factors_made_anew_give_the_same_update(name, fields, make_llama, tokens, shake):
    model = shake(adapted(make_llama, r=4, **fields)).eval()
    before = model(tokens).logits
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad])
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    before = model(tokens).logits
    options = {"every": 1} if name == "reorthogonalise" else {"first": 1, "to": 3}
    model.base_model.set_schedules({name: options})
    model.base_model.after_step(optimizer)
    assert not optimizer.state
    torch.testing.assert_close(
        model(tokens).logits, before, rtol=1e-3, atol=1e-4 if name == "reorthogonalise" else 0.5
    )
    for layer in layers(model):
        down = layer.tensors("default")[0 if "down" in layer.tensors("default")[0] else 1]["down"]
        if name == "reorthogonalise":
            torch.testing.assert_close(down @ down.T, torch.eye(4), rtol=1e-4, atol=1e-5)
        else:
            assert not down[3:].any() and down[:3].any(1).all()


def test_an_annealed_update_is_the_best_of_its_rank(make_llama, shake):
    model = shake(adapted(make_llama, method="slora", r=4))
    before = [layer.get_delta_weight("default") for layer in layers(model)]
    model.base_model.set_schedules({"anneal_rank": {"first": 1, "to": 2}})
    model.base_model.after_step()
    for layer, whole in zip(layers(model), before, strict=True):
        left, values, right = torch.linalg.svd(whole)
        best = left[:, :2] * values[:2] @ right[:2]
        torch.testing.assert_close(layer.get_delta_weight("default"), best, rtol=1e-4, atol=1e-5)


def test_keep_close_is_the_divergence_from_the_base(make_llama, tokens, shake):
    model = shake(adapted(make_llama, lora_dropout=0.5, schedules={"keep_close": {"strength": 2.0}})).train()
    labels = tokens.clone()
    labels[:, :4] = -100
    output = model(tokens, labels=labels)
    found = model.base_model.penalty()
    with model.disable_adapter(), torch.no_grad():
        base = model(tokens).logits.log_softmax(-1)
    ours = output.logits.log_softmax(-1)
    expected = 2.0 * (base.exp() * (base - ours)).sum(-1)[:, 3:-1].mean()
    torch.testing.assert_close(found, expected)
    assert found.requires_grad and all(
        layer.training and not layer.disable_adapters for layer in layers(model)
    )
    with pytest.raises(NdLoraValueError, match="call penalty\\(\\) after the forward pass"):
        model.base_model.penalty()


NO_RANK = {"equation": "out a, a in -> out in", "sizes": {"a": 3}}
# schedules, fields of the adapter, what the message says
REFUSED = [
    ({"nested_rnk": {}}, {}, "schedules='nested_rnk' is no known schedule. Did you mean 'nested_rank'?"),
    (
        {"nested_rank": {"least": 0}},
        {},
        "schedules={'nested_rank': ...}: least=0: choose an integer of at least 1",
    ),
    (
        {"nested_rank": {"lest": 2}},
        {},
        "schedule='nested_rank' has no such option; it has 'least', 'learn', 'scale'",
    ),
    ({"group_lasso": {"groups": "all"}}, {}, "groups='all': choose one of"),
    ({"anneal_rank": {"keep": 1.0}}, {}, "keep=1.0: choose a number from 0 to 0.99"),
    (["nested_rank", "anneal_rank"], {}, "each says which ranks a step sees"),
    (3, {}, "schedules=3: give a "),
    ("nested_rank", {"method": "einsum", "options": NO_RANK}, "no rank axis"),
    (
        {"ordered_dropout": {"tails": 1e-6}},
        {"method": "random_tucker"},
        "no rank axis, and so no tails: set tails=0",
    ),
    ("sparse_ranks", {"method": "slora"}, "it trains no gate of its own for each rank"),
    ("anneal_rank", {"anchor": "snapshot"}, "set anchor='none'"),
    ("reorthogonalise", {"method": "crossed"}, "no product of two sides"),
    ("reorthogonalise", {"method": "ffa_lora"}, "set save_frozen=True"),
    ("anneal_rank", {"method": "shared_core"}, "no product of two sides"),
    ({"group_lasso": {"proximal": True}}, {"method": "shared_core"}, "set proximal=False"),
]


@pytest.mark.parametrize("given, fields, message", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_changed(given, fields, message, make_llama):
    base = make_llama()
    modules = [name for name, _ in base.named_modules()]
    with pytest.raises(NdLoraValueError, match=re.escape(message)):
        fields = {"method": "sora", "r": 4, "target_modules": TARGETS, "schedules": given} | fields
        get_peft_model(base, NdLoraConfig(**fields))
    assert [name for name, _ in base.named_modules()] == modules

    fields.pop("schedules")
    model = get_peft_model(make_llama(), NdLoraConfig(**fields, task_type="CAUSAL_LM"))
    chosen = dict(model.base_model.clock.chosen)
    with pytest.raises(NdLoraValueError, match=re.escape(message)):
        model.base_model.set_schedules(given)
    assert model.base_model.clock.chosen == chosen


def test_a_schedule_of_what_does_not_train_is_refused(make_llama):
    model = adapted(make_llama)
    model.set_requires_grad("default", False)
    with pytest.raises(NdLoraValueError, match="adapter 'default' does not train"):
        model.base_model.set_schedules("group_lasso")
    with pytest.raises(NdLoraValueError, match="no NDLORA adapter 'other'"):
        model.base_model.set_schedules("group_lasso", adapter="other")


def test_an_adapter_is_used_without_the_plugin_that_trained_it(make_llama, stranger, tmp_path, tokens):
    stranger("dylora")
    adapted(make_llama, method="slora", schedules="strange_ranks").save_pretrained(tmp_path)
    config = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config.replace("strange_ranks", "gone"))
    assert PeftModel.from_pretrained(make_llama(), tmp_path)(tokens).logits.isfinite().all()
    with pytest.raises(NdLoraValueError, match="is no known schedule"):
        PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True)
