"""The training step that a method sees: one for all layers and what checkpointing runs again, and then the next."""

import copy
import subprocess
import sys
from collections import Counter

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch._dynamo.testing import CompileCounter

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.integrations.peft.layers.layer import NdLoraLayer
from ndlora_plugins.schedules import Moment

RANK = 8
# step, seed, high -> the draw on every machine and in every version
DRAWS = [(0, 0, 8, 3), (1, 0, 8, 2), (2, 0, 8, 4), (0, 1, 8, 3), (0, -1, 8, 5), (10**9, 2**40, 1000, 123)]


@pytest.fixture(autouse=True)
def dylora(stranger):
    """DyLoRA: every forward in training uses the first ranks, as many as were drawn for the step."""
    return stranger("dylora")


def config(**options):
    targets = ["q_proj", "down_proj"]
    return NdLoraConfig(
        method="strange_dylora", r=RANK, **{"target_modules": targets, "task_type": "CAUSAL_LM"} | options
    )


def layers(model):
    return [module for module in model.modules() if isinstance(module, NdLoraLayer)]


def ranks(model, tokens, adapter="default"):
    """One training forward and backward -> of each layer, how many ranks got a gradient."""
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    gradients = [layer.ndlora_factors[adapter]["down"].grad for layer in layers(model)]
    return [int(gradient.any(1).sum()) for gradient in gradients]


def expected(step, seed=0):
    return 1 + Moment(step, seed).draw(RANK)


@pytest.mark.parametrize("step, seed, high, number", DRAWS)
def test_a_draw_is_the_same_everywhere(step, seed, high, number):
    assert Moment(step, seed).draw(high) == number


def test_a_draw_does_not_hang_on_how_python_hashes():
    script = "from ndlora_plugins.schedules import Moment; print([Moment(s, 3).draw(100) for s in range(20)])"
    outputs = {
        subprocess.run(
            [sys.executable, "-P", "-c", script],
            env={"PYTHONHASHSEED": seed}, capture_output=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert outputs == {f"{[Moment(step, 3).draw(100) for step in range(20)]}\n".encode()}


@pytest.mark.parametrize("high", [2, 7, 8, 64])
@pytest.mark.parametrize("seed", [0, 42])
def test_draws_are_uniform(high, seed):
    steps = 500 * high
    counts = Counter(Moment(step, seed).draw(high) for step in range(steps))
    assert counts.keys() == set(range(high))
    square = sum((count - 500) ** 2 / 500 for count in counts.values())
    # of a chi-square with high - 1 degrees: mean high - 1, variance twice that
    assert square < high - 1 + 5 * (2 * (high - 1)) ** 0.5
    pairs = Counter(
        (Moment(step, seed).draw(high), Moment(step + 1, seed).draw(high)) for step in range(steps)
    )
    assert max(pairs.values()) < 6 * max(steps / high**2, 4)


def test_every_forward_of_a_training_is_a_step_and_all_layers_draw_the_same(make_llama, tokens, shake):
    model = shake(get_peft_model(make_llama(), config())).train()
    found = [ranks(model, tokens) for _ in range(10)]
    assert found == [4 * [expected(step)] for step in range(1, 11)]
    assert len({rank for row in found for rank in row}) > 3


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_what_checkpointing_runs_again_sees_the_same_step(use_reentrant, make_llama, tokens, shake):
    model = shake(get_peft_model(make_llama(), config())).train()
    copied = copy.deepcopy(model)
    copied.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for _ in range(4):
        assert ranks(model, tokens) == ranks(copied, tokens)
        wanted, found = (
            {key: value.grad for key, value in each.named_parameters() if value.requires_grad}
            for each in (model, copied)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)


def test_evaluation_uses_all_ranks_and_is_no_step(make_llama, tokens, shake):
    model = shake(get_peft_model(make_llama(), config())).eval()
    before = model.base_model.clock.step
    logits = model(tokens).logits
    assert torch.equal(model(tokens).logits, logits)
    assert model.base_model.clock.step == before
    torch.testing.assert_close(model.merge_and_unload()(tokens).logits, logits, rtol=1e-4, atol=1e-5)


def test_a_driven_clock_stands_still(make_llama, tokens, shake):
    model = shake(get_peft_model(make_llama(), config())).train()
    clock = model.base_model.clock
    clock.driven, clock.step = True, 5
    assert [ranks(model, tokens) for _ in range(3)] == 3 * [4 * [expected(5)]]


def test_each_adapter_has_its_own_seed(make_llama, tokens, shake):
    model = get_peft_model(make_llama(), config(random_seed=1))
    model.add_adapter("other", config(random_seed=2))
    for name in ("other", "default"):
        model.set_adapter(name)
        shake(model)
    model.train()
    found = [ranks(model, tokens) for _ in range(6)]
    assert found == [4 * [expected(step, 1)] for step in range(1, 7)]
    model.set_adapter("other")
    found = [ranks(model, tokens, "other") for _ in range(6)]
    assert found == [4 * [expected(step, 2)] for step in range(7, 13)]


def test_a_loaded_adapter_draws_as_before(make_llama, tokens, shake, tmp_path):
    model = shake(get_peft_model(make_llama(), config(random_seed=7))).train()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True).train()
    assert [ranks(loaded, tokens) for _ in range(4)] == [ranks(model, tokens) for _ in range(4)]


@pytest.mark.parametrize("copied", [False, True])
def test_without_a_peft_model_every_forward_of_a_training_is_a_step_too(copied, make_llama, tokens, shake):
    model = make_llama()
    inject_adapter_in_model(config(), model)
    inject_adapter_in_model(config(target_modules=["o_proj"]), model, adapter_name="other")
    shake(model).train()
    model = copy.deepcopy(model) if copied else model
    found = [ranks_of_two(model, tokens) for _ in range(6)]
    assert found == [{expected(step)} for step in range(1, 7)]
    assert len({id(layer.clock) for layer in layers(model)}) == 1
    model.eval()
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    assert layers(model)[0].clock.step == 6


def ranks_of_two(model, tokens):
    model.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    gradients = [
        value.grad
        for key, value in model.named_parameters()
        if key.endswith("down") and value.grad is not None
    ]
    assert gradients
    return {int(gradient.any(1).sum()) for gradient in gradients}


@pytest.mark.parametrize(
    "adapt", [get_peft_model, lambda model, chosen: inject_adapter_in_model(chosen, model)]
)
def test_a_training_of_a_method_that_asks_for_no_step_is_compiled_once(adapt, make_llama, tokens):
    chosen = NdLoraConfig(method="slora", target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = adapt(make_llama(num_hidden_layers=1), chosen).train()
    assert not model._forward_pre_hooks
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for _ in range(4):
        compiled(tokens, labels=tokens).loss.backward()
    first = counter.frame_count
    for _ in range(3):
        compiled(tokens, labels=tokens).loss.backward()
    assert counter.frame_count == first
    assert first <= 2
