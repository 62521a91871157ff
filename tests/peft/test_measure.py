"""Starts from gradients: what is measured is dL/dW, and nothing of the model is changed by it."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraTypeError, NdLoraValueError
from ndlora_plugins.integrations.peft import measure_gradients
from ndlora_plugins.integrations.peft.measure import start_from_gradients

# model's fixture -> the layers that are adapted
MODELS = {
    "make_llama": ["q_proj", "down_proj", "lm_head"],
    "make_gpt2": ["c_attn", "c_fc", "c_proj"],
}


@pytest.fixture(autouse=True)
def lora_sb(stranger):
    """LoRA-SB: its sides are the singular vectors of the gradient."""
    return stranger("lora_sb")


def config(**options):
    return NdLoraConfig(
        method="strange_sb",
        **{"r": 4, "target_modules": ["q_proj", "o_proj"], "task_type": "CAUSAL_LM"} | options,
    )


def batches(tokens):
    return [tokens, tokens.flip(1)[:1]]


def steps(model, tokens):
    """Two forward passes and two backward passes."""

    def run():
        for batch in batches(tokens):
            model(batch, labels=batch).loss.backward()

    return run


def state(model):
    """What a measurement must leave as it is."""
    return [
        (key, value.requires_grad, value.grad, value._version) for key, value in model.named_parameters()
    ] + [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


@pytest.mark.parametrize("fixture", MODELS)
def test_it_is_autograds_gradient(fixture, request, tokens):
    model = request.getfixturevalue(fixture)()
    chosen = config(target_modules=MODELS[fixture])
    measure_gradients(model, chosen, steps(model, tokens))
    reference = request.getfixturevalue(fixture)(dtype=torch.float64)
    steps(reference, tokens)()
    assert len(chosen.session.gradients) >= 5
    for name, found in chosen.session.gradients.items():
        gradient = reference.get_submodule(name).weight.grad / len(batches(tokens))
        wanted = gradient.T if fixture == "make_gpt2" else gradient
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))


class Twice(nn.Module):
    """A layer that is used twice in a forward, behind an embedding that PEFT knows nothing of."""

    def __init__(self):
        super().__init__()
        self.table, self.layer = nn.Embedding(10, 6), nn.Linear(6, 6)

    def forward(self, indices):
        return self.layer(self.layer(self.table(indices)).relu())


def test_a_layer_that_is_used_twice_and_a_model_that_is_no_transformers_model():
    model, indices = Twice(), torch.arange(8).view(2, 4)
    chosen = NdLoraConfig(method="strange_sb", r=2, target_modules=["layer"])

    def run():
        for k in range(2):
            model(indices[k]).square().sum().backward()

    measure_gradients(model, chosen, run)
    run()
    torch.testing.assert_close(chosen.session.gradients["layer"], model.layer.weight.grad / 2)


# method, anchor: with frozen factors and with none
HELD = [("strange_sb", None), ("slora", "snapshot"), ("slora", "none"), ("nlora", "none")]


@pytest.mark.parametrize("method, anchor", HELD)
def test_an_adapter_that_is_there_starts_as_one_that_is_made_of_the_gradients(
    method, anchor, make_llama, tokens
):
    fields = {"anchor": anchor, "random_seed": 1}
    if method != "strange_sb":
        fields["init_lora_weights"] = "lora_ga"
    model, base = make_llama(), make_llama()
    chosen = replace(config(**fields), method=method)
    measure_gradients(model, chosen, steps(model, tokens))
    expected = get_peft_model(model, chosen).state_dict()
    late = get_peft_model(base, replace(chosen, gradient_batches=2))
    start_from_gradients(late, "default", steps(base, tokens))
    for key, value in late.state_dict().items():
        torch.testing.assert_close(value, expected[key])


@pytest.mark.parametrize("frozen", [False, True])
def test_of_four_bits(frozen, tokens, make_llama):
    pytest.importorskip("bitsandbytes")
    from bitsandbytes.nn import Linear4bit

    model = Twice().requires_grad_(not frozen)
    model.layer = nn.Linear(64, 64)
    model.table = nn.Embedding(10, 64)
    quantised = Linear4bit(64, 64, compute_dtype=torch.float32)
    quantised.load_state_dict(model.layer.state_dict())
    quantised = quantised.to("cpu")
    dense = quantised(torch.eye(64)).detach() - quantised.bias.detach()  # W^T
    reference = nn.Linear(64, 64)
    with torch.no_grad():
        reference.weight.copy_(dense.T)
        reference.bias.copy_(quantised.bias)
    indices = torch.arange(8).view(2, 4)
    gradients = []
    chosen = NdLoraConfig(method="strange_sb", r=2, target_modules=["layer"])
    for layer in (quantised, reference):
        model.layer = layer
        measure_gradients(model, chosen, lambda: model(indices).square().sum().backward())
        gradients.append(chosen.session.gradients["layer"])
    reference.weight.grad = None
    model(indices).square().sum().backward()
    torch.testing.assert_close(gradients[1], reference.weight.grad)
    torch.testing.assert_close(
        gradients[0], gradients[1], rtol=0.05, atol=0.05 * float(gradients[1].abs().max())
    )


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant, make_llama, tokens):
    found = []
    for checkpointing in (False, True):
        model, chosen = make_llama().train(), config()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        measure_gradients(model, chosen, steps(model, tokens))
        found.append(chosen.session.gradients)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails, make_llama, tokens):
    model, chosen = make_llama(), config()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before, run = state(model), steps(model, tokens)

    def broken():
        run()
        raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            measure_gradients(model, chosen, broken)
        assert not chosen.session.gradients
    else:
        measure_gradients(model, chosen, run)
        assert len(chosen.session.gradients) == 4
    assert state(model) == before
    assert model.lm_head.weight.grad.eq(1).all()


# what `step` does, the configuration's options, error, its words
WRONG_STEPS = [
    (
        lambda model, tokens: model(tokens), {}, NdLoraValueError,
        r"No gradient reached 4 layers, the first is 'model.layers.0.self_attn.q_proj': `step` must call backward\(\)",
    ),
    (
        lambda model, tokens: None, {"target_modules": ["embed_tokens"]}, NdLoraTypeError,
        "Layer 'model.embed_tokens' of type Embedding is not linear: its gradient cannot be measured",
    ),
]  # fmt: skip


@pytest.mark.parametrize("step, options, error, message", WRONG_STEPS)
def test_a_step_that_brings_nothing(step, options, error, message, make_llama, tokens):
    model = make_llama()
    before = state(model)
    with pytest.raises(error, match=message):
        measure_gradients(model, config(**options), lambda: step(model, tokens))
    assert state(model) == before


# what a configuration has in the place of gradients -> the words of the error
WITHOUT = [
    ({}, "reads the gradient of layer 'model.layers.0.self_attn.q_proj', and none was measured: call"),
    (
        {"model.layers.0.self_attn.q_proj": torch.ones(2, 3)},
        r"reads the gradient of layer 'model.layers.0.self_attn.q_proj', and the one measured is \[2, 3\]: call",
    ),
]


@pytest.mark.parametrize("gradients, message", WITHOUT)
def test_no_start_without_gradients(gradients, message, make_llama):
    model, chosen = make_llama(), config()
    chosen.session.gradients = gradients
    before, modules = state(model), list(model.modules())
    with pytest.raises(NdLoraValueError, match=f"^init_lora_weights='first_gradient' {message}"):
        get_peft_model(model, chosen)
    assert state(model) == before and list(model.modules()) == modules


def test_it_starts_from_them_lets_them_go_and_is_loaded_without(make_llama, tokens, shake, tmp_path):
    base, chosen = make_llama(), config()
    logits = base(tokens).logits
    measure_gradients(base, chosen, steps(base, tokens))
    gradient = chosen.session.gradients["model.layers.0.self_attn.q_proj"]
    model = get_peft_model(base, chosen)
    frozen = model.base_model.model.model.layers[0].self_attn.q_proj.ndlora_frozen["default"]
    right = torch.linalg.svd(gradient.sign())[2][:4]
    torch.testing.assert_close((frozen.down @ right.T).abs().diag(), torch.ones(4), rtol=0, atol=0.05)
    torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-4, atol=1e-5)
    assert not model.peft_config["default"].session.gradients
    shake(model, 0.5).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=True)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    loaded.load_adapter(tmp_path, "other")
    loaded.set_adapter("other")
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_configuration_from_a_file_alone_is_no_adapter(make_llama, tokens, tmp_path):
    base, chosen = make_llama(), config()
    measure_gradients(base, chosen, steps(base, tokens))
    get_peft_model(base, chosen).save_pretrained(tmp_path)
    again = NdLoraConfig.from_pretrained(tmp_path)
    again.inference_mode = False
    model = get_peft_model(make_llama(), again)
    with pytest.raises(NdLoraValueError, match="'default' starts from gradients, and has neither these nor"):
        model(tokens)
    base, again = make_llama(), NdLoraConfig.from_pretrained(tmp_path)
    measure_gradients(base, again, steps(base, tokens))
    get_peft_model(base, again)(tokens)


def test_a_second_adapter_of_a_model(make_llama, tokens):
    model, chosen = (
        get_peft_model(make_llama(), NdLoraConfig(method="slora", task_type="CAUSAL_LM")),
        config(),
    )
    with pytest.raises(NdLoraValueError, match="none was measured"):
        model.add_adapter("other", chosen)
    measure_gradients(model.get_base_model(), chosen, steps(model, tokens))
    model.add_adapter("other", chosen)
    model.set_adapter("other")
    model(tokens, labels=tokens).loss.backward()
