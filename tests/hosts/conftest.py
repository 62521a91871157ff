"""A tiny random BERT, saved as any encoder is, with a tokenizer of a few words."""

import importlib.util
import pathlib
import sys

import pytest
import torch

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"
WORDS = "a dull film and great acting with no plot but fine music bad good very not is was it the".split()


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """The directory of a tiny random BERT: hidden 32, two layers."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    directory = tmp_path_factory.mktemp("encoder")
    vocabulary = directory / "words.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(vocabulary), model_max_length=32).save_pretrained(directory)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes, vocab_size=len(WORDS) + 5)).save_pretrained(directory)
    return directory


@pytest.fixture
def example():
    """A function that loads a script of examples/ as a module."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # workers of the hosts unpickle what it defines
        spec.loader.exec_module(module)
        return module

    return load
