"""What else reads or changes a layer's tensors: in-place operations, torch.func, hosts that keep the input's dtype, and
whatever runs beside `generate`.
"""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from peft import get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.func import functional_call, grad, vmap
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LogitsProcessor,
    LogitsProcessorList,
    OlmoConfig,
    OlmoForCausalLM,
)

from ndlora_plugins import NdLoraConfig, fused
from ndlora_plugins.integrations.peft.layers.layer import NdLoraLayer

METHODS = {
    "ndlinear": {"method": "ndlinear"},
    "ndlinear, crossed": {"crossed_modes": 4},
    "ndlinear, snapshot": {"init_lora_weights": "ndlinear", "anchor": "snapshot"},
    "slora": {"method": "slora", "r": 4},
    "nlora": {"method": "nlora", "r": 4},
    "nlora, slices": {"init_lora_weights": "n_lora", "r": 4},
    "inttune": {"method": "inttune", "r": 4},
}


@pytest.fixture(params=METHODS)
def config(request):
    return lambda **options: NdLoraConfig(**METHODS[request.param], **options)


# --- models that change what a layer gives

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4}
# name -> the model; both change the output of a projection in place
CHANGING = {
    "DeBERTa": lambda: DebertaV2ForSequenceClassification(
        DebertaV2Config(
            **SIZES,
            **HEADS,
            relative_attention=True,
            position_buckets=8,
            max_relative_positions=16,
            pos_att_type=["c2p", "p2c"],
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ),
    "OLMo": lambda: OlmoForCausalLM(
        OlmoConfig(**SIZES, **HEADS, clip_qkv=0.05, attention_bias=True, pad_token_id=0)
    ),
}


@pytest.mark.parametrize("name", CHANGING)
def test_a_model_that_changes_outputs_in_place_trains(name, config, tokens, shake):
    options = {"target_modules": "all-linear", "exclude_modules": ["classifier"]}
    model = shake(get_peft_model(CHANGING[name](), config(**options)))
    labels = torch.tensor([0, 1]) if name == "DeBERTa" else tokens
    found = {}
    for way in (nullcontext, fused.plain_autograd):
        model.zero_grad()
        with way():
            loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        found[way] = loss, {key: p.grad.clone() for key, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(*found.values(), atol=1e-5, rtol=1e-4)


# --- torch.func

# the layer and one sample of its input
KINDS = {
    "linear": (lambda: nn.Linear(24, 32), torch.randn(3, 24)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), torch.randn(4, 5, 5)),
    "embedding": (lambda: nn.Embedding(24, 32), torch.tensor([3, 5, 7])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_each_sample(kind, config, shake):
    make, sample = KINDS[kind]
    model = shake(get_peft_model(nn.Sequential(make()), config(target_modules=["0"])))
    factors = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    samples = torch.stack([sample, sample.flip(0), sample])

    def loss(factors, sample):
        return functional_call(model, factors, (sample,)).square().sum()

    found = vmap(grad(loss), (None, 0))(factors, samples)
    for index, each in enumerate(samples):
        model.zero_grad()
        model(each).square().sum().backward()
        for name in factors:
            torch.testing.assert_close(
                found[name][index], model.get_parameter(name).grad, atol=1e-4, rtol=1e-4
            )


# --- PEFT's `disable_input_dtype_casting`


def keep_in_float16(model):
    """Every module's parameters are float32 while it runs and float16 else, as diffusers' layerwise casting does it."""

    def cast(module, dtype):
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(dtype)

    for module in model.half().modules():
        module.register_forward_pre_hook(lambda module, args: cast(module, torch.float32))
        module.register_forward_hook(lambda module, args, output: cast(module, torch.float16))
    return model


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_input_keeps_its_dtype(kind, config, shake):
    make, sample = KINDS[kind]
    model = keep_in_float16(shake(get_peft_model(nn.Sequential(make()), config(target_modules=["0"]))))
    wide = copy.deepcopy(model).float()
    x = sample * 1e5  # float16 has no number so large
    with disable_input_dtype_casting(model):
        torch.testing.assert_close(model(x), wide(x))
    assert not model(x).isfinite().all()
    with disable_input_dtype_casting(model, active=False):
        assert not model(x).isfinite().all()


# --- while `generate` runs


class Between(LogitsProcessor):
    """Between two tokens: changes the adapter, evaluates it on another thread, copies and pickles the model."""

    def __init__(self, model, tokens):
        self.model, self.tokens, self.step = model, tokens, 0

    def __call__(self, input_ids, scores):
        self.step += 1
        if self.step == 3:
            for name, parameter in self.model.named_parameters():
                if "ndlora_factors" in name:
                    parameter.data.mul_(0.5)  # unseen by autograd
            with ThreadPoolExecutor(1) as pool:
                self.said = pool.submit(torch.no_grad()(self.model), self.tokens).result().logits
            # a layer: transformers 5.16 cannot pickle a model, with LoRA neither
            self.layer = next(module for module in self.model.modules() if isinstance(module, NdLoraLayer))
            self.copied, self.pickled = copy.deepcopy(self.model), pickle.dumps(self.layer)
        return scores


def test_a_change_while_generate_runs_is_seen(config, make_llama, shake, tokens):
    model = shake(get_peft_model(make_llama(), config(target_modules="all-linear"))).eval()
    between = Between(model, tokens)
    found = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        use_cache=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
        logits_processor=LogitsProcessorList([between]),
    )
    with torch.no_grad():
        expected = model(found.sequences).logits[:, tokens.shape[1] - 1 : -1]
        torch.testing.assert_close(
            torch.stack(found.logits[3:], dim=1), expected[:, 3:], atol=1e-4, rtol=1e-4
        )
        assert not torch.allclose(found.logits[1], expected[:, 1], atol=1e-4)
        torch.testing.assert_close(between.said, model(tokens).logits, atol=1e-5, rtol=1e-5)
        shake(model)
        shake(between.copied)
        torch.testing.assert_close(between.copied(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)
        layer, x = pickle.loads(between.pickled), torch.randn(3, between.layer.in_features)
        assert not torch.equal(layer(x), layer.base_layer(x))
        for factor in layer.ndlora_factors.parameters():
            factor.zero_()
        torch.testing.assert_close(layer(x), layer.base_layer(x))
