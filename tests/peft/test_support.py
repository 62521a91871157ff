"""What works where: every method on every kind of layer and base. docs/support.md shows the table of this file.

`python -P tests/peft/test_support.py` writes it anew.
"""

import copy
import pathlib
import re
import sys

import pytest
import torch
import transformers
from peft import PeftModel, convert_to_lora, get_peft_model
from transformers import BitsAndBytesConfig, TorchAoConfig

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraError
from ndlora_plugins.integrations.peft.exports.export import export_adapter
from ndlora_plugins.registry import methods

if __name__ == "__main__":
    sys.path.append(str(pathlib.Path(__file__).resolve().parents[1] / "tables"))
from representative import REPRESENTATIVE, each  # noqa: E402

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "support.md"
# what of a method is not its default
CHANGED = {
    "slora": {"r": 2},
    # the slices as they are: the noise that stands for a training is of one size
    "nlora": {"r": 2, "init_lora_weights": "n_lora"},
    "inttune": {"r": 2, "init_lora_weights": "n_lora"},
    "einsum": {"r": 2},
    # a trained number counts much: a smaller scale, so that the noise is no larger than others'
    **{
        name: {"lora_alpha": 1}
        for name in ("svfit", "random_diagonal", "loldu", "nola", "random_tucker", "tensor_train")
    },
}
ALL, NONE = tuple(methods()), ()


def but(*names):
    return tuple(method for method in ALL if method not in names)


# a train of three modes, and the random network on some layers, have no low-rank form; shared modes no sum
TRAINED = but("tensor_train")
STEPS = [
    "start",
    "train",
    "save, load",
    "merge, unmerge",
    "a batch of several adapters",
    "weighted sum",
    "PEFT's convert_to_lora",
    "export lora",
    "export lokr",
    "export merged",
]
# kind of layer -> for which methods each of the steps works; elsewhere it is refused with the reason
LINEAR = [ALL, ALL, ALL, ALL, ALL, TRAINED, ALL, TRAINED, ("ndlinear",), ALL]
OTHER = [ALL, ALL, ALL, ALL, ALL, TRAINED, NONE, NONE, NONE, ALL]
CONVOLUTION = [*OTHER[:7], TRAINED, *OTHER[8:]]
SUPPORT = {
    "linear": LINEAR,
    "linear, Conv1D": [*LINEAR[:8], NONE, ALL],
    "linear, bitsandbytes 4-bit": LINEAR,
    "linear, bitsandbytes 8-bit": LINEAR,
    "linear, torchao int8": LINEAR,
    "embedding": OTHER,
    "convolution, 1-D": [
        *OTHER[:5],
        but("tensor_train", "random_tucker", "shared_crossed"),
        NONE,
        but("crossed", "shared_crossed", "tensor_train", "random_tucker"),
        *OTHER[8:],
    ],
    "convolution, 2-D": CONVOLUTION,
    "convolution, depthwise": [*OTHER[:5], ALL, *OTHER[6:]],
    "convolution, 3-D": CONVOLUTION,
    "experts": [*[ALL] * 4, *[NONE] * 3, but("tensor_train"), NONE, ALL],
}

SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT = {**SMALL, "num_key_value_heads": 4, "vocab_size": 64}
IDS = {"input_ids": torch.arange(20).view(2, 10)}
# kind -> model class, its configuration, how it is loaded, input, what is adapted
BASES = {
    "linear": ("LlamaForCausalLM", TEXT, {}, IDS, {}),
    "linear, Conv1D": (
        "GPT2LMHeadModel",
        {"n_embd": 48, "n_layer": 1, "n_head": 4, "vocab_size": 64},
        {},
        IDS,
        {},
    ),
    "linear, bitsandbytes 4-bit": (
        "LlamaForCausalLM",
        TEXT,
        {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)},
        IDS,
        {},
    ),
    "linear, bitsandbytes 8-bit": (
        "LlamaForCausalLM",
        TEXT,
        {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
        IDS,
        {},
    ),
    "linear, torchao int8": ("LlamaForCausalLM", TEXT, "torchao", IDS, {}),
    "embedding": ("LlamaForCausalLM", TEXT, {}, IDS, {"target_modules": ["embed_tokens"]}),
    "convolution, 1-D": (
        "WhisperForAudioClassification",
        {
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "num_mel_bins": 8,
            "max_source_positions": 6,
            "decoder_layers": 1,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 16,
        },
        {},
        {"input_features": torch.linspace(-1, 1, 2 * 8 * 12).view(2, 8, 12)},
        {"target_modules": ["conv1", "conv2"]},
    ),
    "convolution, 2-D": (
        "ViTForImageClassification",
        {**SMALL, "image_size": 16, "patch_size": 4},
        {},
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 256).view(2, 3, 16, 16)},
        {"target_modules": ["projection"]},
    ),
    "convolution, depthwise": (
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 16, "patch_size": 2},
        {},
        {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 256).view(2, 3, 16, 16)},
        {"target_modules": ["dwconv", "depthwise_conv"], "r": 1},
    ),
    "convolution, 3-D": (
        "VideoMAEForVideoClassification",
        {**SMALL, "image_size": 8, "patch_size": 4, "num_frames": 4},
        {},
        {"pixel_values": torch.linspace(-1, 1, 2 * 4 * 3 * 64).view(2, 4, 3, 8, 8)},
        {"target_modules": ["projection"]},
    ),
    "experts": (
        "MixtralForCausalLM",
        {**TEXT, "num_local_experts": 4},
        {},
        IDS,
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A function that saves a base model once and loads it; returns where it is, and what was loaded."""
    saved = {}

    def save(kind):
        if kind not in saved:
            name, options, loading, *_ = BASES[kind]
            torch.manual_seed(0)
            make = getattr(transformers, name)
            directory = tmp_path_factory.mktemp("base")
            make(make.config_class(**options)).save_pretrained(directory)
            loading = torchao() if loading == "torchao" else loading
            saved[kind] = directory, make.from_pretrained(directory, **loading).eval()
        return saved[kind]

    return save


def torchao():
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}


class Case:
    """One method on one kind of layer, as its steps see it."""

    def __init__(self, kind, fields, base, work, shake):
        _, _, self.options, self.inputs, targets = BASES[kind]
        self.base, self.loaded = base
        self.work, self.shake, self.kept = work, shake, None
        self.config = {"random_seed": 0, **fields, **targets}
        # of an output of about 1: what rounding a merged weight to 4 or 8 bits may cost
        self.tolerance = 0.3 if self.options else 1e-4
        # bitsandbytes rounds the activations too, in some modes: a last bit of difference before it grows
        self.rounding = 5e-3 if self.options else 1e-5

    def load(self):
        return copy.deepcopy(self.loaded)

    def model(self):
        return get_peft_model(self.load(), NdLoraConfig(**self.config)).eval()

    def trained(self):
        self.kept = self.kept or self.shake(self.model(), scale=0.02).eval()
        return copy.deepcopy(self.kept)

    def saved(self):
        if not (self.work / "adapter").exists():
            self.trained().save_pretrained(self.work / "adapter", save_embedding_layers=False)
        return self.work / "adapter"

    def output(self, model, **more):
        with torch.no_grad():
            return model(**self.inputs, **more).logits.float()


def start(case):
    torch.testing.assert_close(case.output(case.model()), case.output(case.load()))


def train(case):
    model = case.model().train()
    model(**case.inputs).logits.square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.any() for gradient in gradients)


def save_and_load(case):
    expected = case.output(case.trained())
    loaded = PeftModel.from_pretrained(case.load(), case.saved()).eval()
    torch.testing.assert_close(case.output(loaded), expected)


def merge(case):
    model = case.trained()
    expected = case.output(model)
    model.merge_adapter()
    torch.testing.assert_close(case.output(model), expected, atol=case.tolerance, rtol=1e-3)
    model.unmerge_adapter()
    torch.testing.assert_close(case.output(model), expected, atol=case.tolerance, rtol=1e-3)


def mixed_batch(case):
    model = case.trained()
    mixed = case.output(model, adapter_names=["default", "__base__"])
    torch.testing.assert_close(mixed[0], case.output(model)[0], atol=case.rounding, rtol=1.3e-6)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], case.output(model)[1])


def weighted_sum(case):
    model = case.trained()
    expected = case.output(model)
    model.add_weighted_adapter(["default", "default"], [0.25, 0.75], "sum")
    model.set_adapter("sum")
    torch.testing.assert_close(case.output(model), expected, atol=max(case.rounding, 1e-4), rtol=1e-3)


def convert(case):
    if not case.trained().supports_lora_conversion():
        raise NdLoraError
    convert_to_lora(case.trained(), rank=2)


def export(to):
    def step(case):
        report = export_adapter(
            case.saved(),
            case.work / to,
            to,
            base=str(case.base),
            rank=4 if to == "lora" and "ndlinear" in case.config.values() else None,
            any_size=True,  # these layers are tiny
        )
        assert report.layers

    return step


RUN = dict(
    zip(
        STEPS,
        [
            start,
            train,
            save_and_load,
            merge,
            mixed_batch,
            weighted_sum,
            convert,
            export("lora"),
            export("lokr"),
            export("merged"),
        ],
        strict=True,
    )
)


def works(step, case):
    try:
        RUN[step](case)
    except NdLoraError:
        return False
    return True


# kinds on which a method meets the same as on another, one of another class or dtype
ALIKE = ("linear, Conv1D", "linear, bitsandbytes 8-bit", "linear, torchao int8", "convolution, 3-D")
CELLS = [
    (kind, method) for kind in BASES for method in (REPRESENTATIVE if kind in ALIKE else each(methods()))
]


@pytest.mark.parametrize(("kind", "method"), CELLS)
def test_cells(kind, method, fields_of, base, tmp_path, shake):
    case = Case(kind, {**fields_of(method), **CHANGED.get(method, {})}, base(kind), tmp_path, shake)
    found = {step: works(step, case) for step in STEPS}
    assert found == {step: method in cell for step, cell in zip(STEPS, SUPPORT[kind], strict=True)}


def text(cell):
    others = but(*cell)
    if 0 < len(others) < len(cell):
        return f"all but {', '.join(others)}"
    return ", ".join(cell) if others and cell else "all" if cell else "refused"


def table():
    lines = [f"| | {' | '.join(STEPS)} |", f"|---{'|---' * len(STEPS)}|"]
    for kind, cells in SUPPORT.items():
        texts = [text(cell) for cell in cells]
        lines.append(f"| {kind} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


GENERATED = re.compile(r"(<!-- support: .*? -->\n).*?(<!-- end -->)", re.DOTALL)


def test_the_page_shows_the_table():
    assert GENERATED.search(PAGE.read_text()).group() == GENERATED.sub(
        lambda found: found[1] + table() + found[2], GENERATED.search(PAGE.read_text()).group()
    )


if __name__ == "__main__":
    PAGE.write_text(GENERATED.sub(lambda found: found[1] + table() + found[2], PAGE.read_text()))
