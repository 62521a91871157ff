"""docs/methods.md says what each method is of, trains, saves and costs; the published counts, exactly.

`python -P tests/test_methods_page.py` writes the page's tables anew.
"""

import pathlib
import re

import pytest
from transformers import LlamaConfig, Qwen3Config

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.budget import make_budget
from ndlora_plugins.integrations.peft.skeleton import model_on_meta
from ndlora_plugins.integrations.peft.tuner.targets import plan_model
from ndlora_plugins.registry import methods

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGE, README = ROOT / "docs" / "methods.md", ROOT / "README.md"
# a line of the README's table: its configuration, its parameters, and what follows its learning rate
CHOICE = re.compile(
    r"^(\| [^|]* \| `(?P<options>\w+=[^`.]*)` \| )[\d,]+( \| [^|]* \| )(?P<leaves>an exact LoRA of rank \d+|[^,|]*)",
    re.M,
)
MODELS = {
    "Qwen3-1.7B": Qwen3Config(
        hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, vocab_size=64,
    ),
    "Llama-3-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=64,
    ),
}  # fmt: skip

# method -> what papers call it, and what its tests hold it against beside the laws that all are held to
METHODS = {
    "crossed": ("ours, after NdLinear-LoRA and LoKr", "torch.kron"),
    "ndlinear": ("NdLinear-LoRA", "torch.kron; PEFT's LoKr"),
    "slora": ("SLoRA", "the paper's equation"),
    "nlora": ("NLoRA", "the paper's equation; the reference's start"),
    "inttune": ("IntTune", "the paper's equation"),
    "lora_xs": ("LoRA-XS", "PEFT's PSOFT, N = S (R - I) S^-1"),
    "lora_sb": ("LoRA-SB", "the SVD of the gradient's sign"),
    "svfit": ("SVFit; the diagonal of KaSA", "the SVD of the weight"),
    "random_diagonal": ("ours, after VeRA", "PEFT's VeRA with b = 1"),
    "loldu": ("LoLDU", "torch.linalg.lu"),
    "rows": ("S2FT, rows", "a dense layer with a masked gradient"),
    "columns": ("S2FT, columns", "a dense layer with a masked gradient"),
    "ffa_lora": ("FFA-LoRA, LoRA-FA", "PEFT's LoRA with a frozen lora_A"),
    "mica": ("MiCA", "the SVD of the weight"),
    "tiled": ("MiSS", "PEFT's MiSS"),
    "sora": ("SoRA", "PEFT's LoRA with open gates"),
    "shared_core": ("LoTR, FacT", "slora, a group of one layer"),
    "shared_diagonal": ("S2-LoRA, LoRTA, CaRA", "PEFT's VeRA with sides that stay"),
    "shared_crossed": ("ours", "torch.kron"),
    "metatt": ("MetaTT-4D; LoRTA with core='diagonal'", "the product of the four factors"),
    "nola": ("NOLA", "the mixture, summed"),
    "tensor_train": ("TT-LoRA", "crossed modes of two modes"),
    "tensor_ring": ("TLoRA's residual", "torch.einsum"),
    "tucker": ("FLoRA", "a dense tensordot"),
    "random_tucker": ("after TeRA's abstract", "torch.einsum"),
    "einsum": ("any", "torch.einsum"),
}
# method, options, trainable on Qwen3-1.7B and on Llama-3-8B: arithmetic on the papers' formulas
PUBLISHED = [
    ("ndlinear", {}, 1_146_880, 2_260_992),
    ("ffa_lora", {"r": 8}, 4_587_520, 11_010_048),
    ("tiled", {"r": 64}, 36_700_160, 88_080_384),
    ("lora_xs", {"r": 32}, 200_704, 229_376),
    ("lora_xs", {"r": 96}, 1_806_336, 2_064_384),
    ("lora_sb", {"r": 64, "init_lora_weights": "svd_step"}, 802_816, 917_504),
    ("svfit", {"r": 64}, 12_544, 14_336),
    ("svfit", {"r": 768}, 150_528, 172_032),
    ("random_diagonal", {"r": 64}, 12_544, 14_336),
    ("shared_core", {"r": 8, "options": {"share": "kind"}}, 323_840, 669_696),
    ("shared_core", {"r": 64, "options": {"share": "kind"}}, 3_293_184, 6_160_384),
    ("shared_core", {"r": 32}, 593_920, 1_146_880),
    ("shared_diagonal", {"r": 32, "options": {"share": "kind"}}, 1_251_456, 2_628_608),
    ("metatt", {"r": 8}, 100_544, 231_872),
    ("metatt", {"r": 64}, 929_792, 1_994_752),
    ("random_tucker", {"options": {"num_modes": 2}}, 41_216, 64_000),
    ("random_tucker", {"options": {"num_modes": 3}}, 16_576, 23_168),
    ("nola", {}, 200_704, 229_376),
]
# methods that an option without a default needs
GIVEN = {"einsum": {"options": {"equation": "out r, r s, s in -> out in"}}}


@pytest.fixture(scope="module")
def skeletons():
    return skeletons_of()


def skeletons_of():
    return {name: model_on_meta(config) for name, config in MODELS.items()}


def budget(model, method="crossed", **options):
    return make_budget(plan_model(model, NdLoraConfig(method=method, **options)))


@pytest.mark.parametrize("method, options, qwen, llama", PUBLISHED)
def test_the_published_counts(method, options, qwen, llama, skeletons):
    found = [budget(model, method, **options).parameters for model in skeletons.values()]
    assert found == [qwen, llama]


def exact_lora(plan):
    """The rank of the LoRA that the update is."""
    update, factors = plan.update(*plan.zeros())
    low_rank = update.low_rank(factors)
    return "-" if low_rank is None else str(low_rank[0].shape[0])


def table(models):
    lines = [
        "| `method` | papers call it | trains | saved beside it | "
        + " | ".join(models)
        + " | is a LoRA of rank | held against |",
        "|---|---|---|---|" + "---:|" * (len(models) + 1) + "---|",
    ]
    for name, (papers, oracle) in METHODS.items():
        budgets = [budget(model, name, **GIVEN.get(name, {})) for model in models.values()]
        plan = budgets[0].rows[0].adapter
        trains = ", ".join(f"`{factor.name}`" for factor in plan.trained)
        saved = "" if plan.recomputed else ", ".join(f"`{factor.name}`" for factor in plan.frozen)
        counts = " | ".join(f"{found.parameters:,}" for found in budgets)
        lines.append(
            f"| `{name}` | {papers} | {trains} | {saved or '-'} | {counts} | {exact_lora(plan)} | {oracle} |"
        )
    return "\n".join(lines) + "\n"


def page(text, models):
    head, rest = text.split("<!-- methods -->\n")
    return head + "<!-- methods -->\n" + table(models) + "<!-- end -->\n" + rest.split("<!-- end -->\n", 1)[1]


def choices(text, models):
    """The README with the parameters and the rank of every configuration in its table made anew."""

    def made(match):
        found = budget(models["Qwen3-1.7B"], **eval(f"dict({match['options']})"))
        rank = exact_lora(found.rows[0].adapter)
        leaves = match["leaves"] if rank == "-" else f"an exact LoRA of rank {rank}"
        return f"{match[1]}{found.parameters:,}{match[3]}{leaves}"

    return CHOICE.sub(made, text)


def test_the_choices_of_the_readme(skeletons):
    assert README.read_text() == choices(README.read_text(), skeletons)


def test_every_method_has_its_line():
    assert set(METHODS) == {name for name, found in methods().items() if found.plugin == "ndlora-plugins"}


def test_the_page_shows_the_table(skeletons):
    assert PAGE.read_text() == page(PAGE.read_text(), skeletons)


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), skeletons_of()))
    README.write_text(choices(README.read_text(), skeletons_of()))
