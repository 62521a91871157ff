"""README.md beside an adapter: its part of ours, a header that the hub takes, and everything else left alone."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraWarning
from ndlora_plugins.integrations.peft.files.card import write_model_card
from ndlora_plugins.integrations.trl import NdLoraCallback, keep_model_card

pytest.importorskip("trl")

HEADING = "## NDLORA adapter"
# lines of the table
RECIPE = ("| r | 4 |", "| lora_alpha | 16 |", "| anchor | snapshot |", "| target_modules | q_proj, v_proj |")
TRAINING = ("| learning rate | 0.05 |", "| steps | 4 |", "| batch | 8 |")
# two layers of 32 -> 32 and 32 -> 16, r=4
COUNTS = f"{2 * (4 * (64 + 48) + 2 * 16):,} numbers in 4 layers"
NLORA = {"method": "nlora", "r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
# what a card of a language model says of loading and serving
WAYS_OUT = (
    "import ndlora_plugins",
    "--to lora",
    "--to gguf",
    "--to merged",
    "vllm serve",
    "llama-server",
    "ndlora verify",
)
# a user's own card -> what has to be in it still
CARDS = {
    "with a header": "---\nlicense: mit\ntags: [maths]\n---\n# My adapter\n\nTrained on my data.\n",
    "without": "# My adapter\n\nTrained on my data.\n",
    "without a heading": "Trained on my data.\n",
}


def read(directory):
    """The header as a mapping, and the text."""
    _, header, text = (directory / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(header), text


@pytest.fixture
def adapted(model):
    from peft import get_peft_model

    return get_peft_model(model, NdLoraConfig(**NLORA))


def test_a_saved_adapter_has_a_card(adapted, base, tmp_path, monkeypatch):
    adapted.save_pretrained(tmp_path / "saved")
    header, text = read(tmp_path / "saved")
    assert header["library_name"] == "peft" and header["pipeline_tag"] == "text-generation"
    assert {"ndlora", "nlora"} <= set(header["tags"])
    assert text.count(HEADING) == 1 and COUNTS in text
    assert all(line in text for line in RECIPE) and "`nlora`: SLoRA started from rows" in text
    assert "learning rate" not in text and "![" not in text
    assert "[More Information Needed]" not in text and "- PEFT" in text
    assert "[arXiv 2502.14482](https://arxiv.org/abs/2502.14482)" in text
    assert [words for words in WAYS_OUT if words not in text] == []
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", text[text.index(HEADING) :], re.DOTALL)[1]
    namespace = {}
    exec(code.replace("PATH_OF_THE_BASE_MODEL", base).replace("PATH_OF_THIS_ADAPTER", "saved"), namespace)
    tokens = torch.tensor([[5, 20, 33, 47]])
    assert torch.equal(namespace["model"](tokens).logits, adapted.eval()(tokens).logits)


def test_a_loaded_adapter_saved_again_has_the_same_card(adapted, tmp_path):
    from peft import PeftModel

    adapted.save_pretrained(tmp_path / "first")
    again = PeftModel.from_pretrained(adapted.unload(), tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    assert read(tmp_path / "first") == read(tmp_path / "second")


def test_no_path_of_this_machine_is_in_the_card(adapted, base, tmp_path):
    adapted.save_pretrained(tmp_path / "saved")
    assert base not in (tmp_path / "saved/README.md").read_text()


def test_a_base_model_of_the_hub_is_named(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    config = NdLoraConfig(**NLORA, base_model_name_or_path="some-one/some-model")
    write_model_card(config, tmp_path)
    header, text = read(tmp_path)
    assert header["base_model"] == "some-one/some-model"
    assert 'from_pretrained("some-one/some-model")' in text and text.count(HEADING) == 1


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_a_users_card_keeps_its_text(card, adapted, tmp_path):
    (tmp_path / "README.md").write_text(card)
    adapted.save_pretrained(tmp_path)
    adapted.save_pretrained(tmp_path)
    header, text = read(tmp_path)
    assert text.count("Trained on my data.") == text.count(HEADING) == text.count(COUNTS) == 1
    assert text.count("# My adapter") == card.count("# My adapter")
    assert header.get("license") == ("mit" if "license" in card else None)


def test_an_adapter_of_no_language_model_is_not_said_to_be_served(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    write_model_card(NdLoraConfig(**{**NLORA, "task_type": "SEQ_CLS"}), tmp_path)
    assert "--to lora" in read(tmp_path)[1] and "vllm" not in read(tmp_path)[1]


def test_the_card_shows_the_picture_of_the_training(make, tmp_path):
    pytest.importorskip("matplotlib")
    trainer = make({**NLORA}, NdLoraCallback(plot=tmp_path / "run.png"))
    trainer.train()
    trainer.save_model()
    output = Path(trainer.args.output_dir)
    (name,) = re.findall(r"!\[.*\]\((.*)\)", read(output)[1])
    assert (output / name).read_bytes() == (tmp_path / "run.png").read_bytes()


def test_our_part_stays_where_the_user_moved_it(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    _, text = read(tmp_path)
    part = text[text.index("<!-- ndlora:") : text.index("<!-- end of ndlora -->")] + "<!-- end of ndlora -->"
    (tmp_path / "README.md").write_text(f"# Mine\n\nFirst.\n\n{part}\n\nLast.\n")
    adapted.save_pretrained(tmp_path)
    _, text = read(tmp_path)
    assert text.index("First.") < text.index(HEADING) < text.index("Last.") and text.count(HEADING) == 1


def test_a_configuration_alone_gets_no_card(tmp_path):
    NdLoraConfig().save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_a_card_that_cannot_be_read_costs_no_adapter(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\ntags: [\n---\n# Mine\n")
    with pytest.warns(NdLoraWarning, match="(?s)README.md was left as it is: .* adapter itself was saved"):
        adapted.peft_config["default"].save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().endswith("# Mine\n")


@pytest.mark.step("model card", host="Trainer", method="nlora")
def test_the_card_of_a_plain_trainer_before_a_push(make):
    check_push(make({**NLORA}, NdLoraCallback()))


@pytest.mark.step("model card", host="SFTTrainer", method="nlora")
def test_the_card_of_trl_before_a_push(base, options, datasets_by_form):
    from trl import SFTConfig, SFTTrainer

    config = NdLoraConfig(**NLORA)
    arguments = SFTConfig(**options)
    data = datasets_by_form["text"]
    check_push(
        SFTTrainer(base, arguments, train_dataset=data, peft_config=config, callbacks=[NdLoraCallback()])
    )


def check_push(trainer):
    """Save and write the card, as `push_to_hub` does before it uploads."""
    keep_model_card(trainer)
    trainer.train()
    output = Path(trainer.args.output_dir)
    for write in (trainer.save_model, trainer.create_model_card):
        write()
        header, text = read(output)
        assert header["library_name"] == "peft" and {"ndlora", "nlora"} <= set(header["tags"])
        assert text.count(HEADING) == 1 and COUNTS in text
        assert all(line in text for line in (*RECIPE, *TRAINING))
        assert "base_model" not in header and "base_model:" not in str(header["tags"])
