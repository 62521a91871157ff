"""Penalties on what the model gives: however it was adapted, and only of adapters that train in it."""

import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraValueError
from ndlora_plugins.integrations.peft.layers.layer import NdLoraLayer
from ndlora_plugins.integrations.peft.tuner.schedules import penalty

STRENGTH = 100.0
# how a model gets its adapter
ADAPTED = {
    "for a task": lambda model: get_peft_model(model, config(task_type="CAUSAL_LM")),
    "for no task": lambda model: get_peft_model(model, config()),
    "without a PEFT model": lambda model: inject_adapter_in_model(config(), model),
}
# what is done with a model of the adapters "default" and "other" -> how many of them ask for the penalty then
OPERATIONS = [
    (lambda model: None, 1),
    (lambda model: model.set_adapter("other"), 1),
    (lambda model: model.base_model.set_adapter(["default", "other"]), 2),
    (lambda model: model.delete_adapter("other"), 1),
    (lambda model: [model.set_adapter("other"), model.delete_adapter("default")], 1),
]


def config(**fields):
    return NdLoraConfig(
        method="slora", r=4, target_modules=["down_proj"], schedules={"keep_close": {"strength": STRENGTH}}, **fields
    )  # fmt: skip


def clock_of(model):
    return next(module.clock for module in model.modules() if isinstance(module, NdLoraLayer))


def divergence(model, base, tokens):
    """The mean divergence of the base's next token from the model's."""
    ours, its = (each(tokens).logits.log_softmax(-1) for each in (model, base))
    return (its.exp() * (its - ours)).sum(-1)[:, :-1].mean()


@pytest.mark.parametrize("adapted", ADAPTED)
def test_a_trainers_loss_has_it_once(adapted, make_llama, tokens, shake):
    model = shake(ADAPTED[adapted](make_llama()), 0.5).train()
    plain = model(tokens, labels=tokens).loss
    expected = plain + STRENGTH * divergence(model, make_llama(), tokens)
    assert expected > plain + 0.1
    clock_of(model).driven = True
    torch.testing.assert_close(model(tokens, labels=tokens).loss, expected)


@pytest.mark.parametrize("operation, count", OPERATIONS)
def test_those_that_do_not_train_ask_for_nothing(operation, count, make_llama, tokens, shake):
    model = get_peft_model(make_llama(), config(task_type="CAUSAL_LM"))
    model.add_adapter("other", config())
    operation(model)
    shake(model, 0.5).train()
    model(tokens, labels=tokens)
    found = penalty(model)
    torch.testing.assert_close(found, count * STRENGTH * divergence(model, make_llama(), tokens))
    assert clock_of(model).chosen.keys() == model.peft_config.keys()


def test_an_unloaded_model_has_no_hook(make_llama):
    model = get_peft_model(make_llama(), config())
    assert model.get_base_model()._forward_hooks
    assert not model.unload()._forward_hooks


def test_schedules_of_several_adapters_are_set_for_all_or_none(make_llama):
    model = get_peft_model(make_llama(), config())
    model.add_adapter("other", NdLoraConfig(method="ffa_lora", target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    before = dict(clock_of(model).chosen)
    with pytest.raises(NdLoraValueError, match="cannot work with method='ffa_lora'"):
        model.base_model.set_schedules("reorthogonalise")
    assert clock_of(model).chosen == before
