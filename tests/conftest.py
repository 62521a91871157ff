"""Fixtures that every folder uses. Models are tiny and random; the real one is in tests/peft/test_real_model.py."""

import copy
import gc
import importlib.util
import os
import pathlib
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("AXOLOTL_DO_NOT_TRACK", "1")

import hypothesis
import pytest
import torch

# the fields of `NdLoraConfig` that a method cannot be without
NEEDED = {
    "einsum": {"options": {"equation": "out r, r s, s in -> out in"}},
    "nola": {"options": {"bases": 6}},
    # their defaults are larger than tiny layers, or the gradients of a batch are needed
    "lora_xs": {"r": 6},
    "lora_sb": {"r": 6, "init_lora_weights": "svd_step"},
    "svfit": {"r": 6},
    "random_diagonal": {"r": 6},
    "loldu": {"r": 6},
}

ROOT = pathlib.Path(__file__).resolve().parent.parent

if importlib.util.find_spec("axolotl"):
    # they look at what is the same in both environments: torch, our own code, files that it alone reads
    collect_ignore = ["benchmarks", "core", "packaging", "strangers", "test_demo.py"]
    collect_ignore += ["trl/test_real_model.py", "peft/test_check.py", "peft/test_combine_commands.py"]
    collect_ignore += ["peft/test_properties_of_directories.py", "peft/test_smaller.py"]


def pytest_addoption(parser):
    parser.addoption(
        "--examples", type=int, help="of each test of properties; other ones every time, not always the same"
    )


def pytest_configure(config):
    for marker in (
        "step(name, host=, method=): what it runs, for the tables of tests/test_hosts.py",
        "examples(number): how many a test of properties makes without --examples",
    ):
        config.addinivalue_line("markers", marker)
    fixed = config.getoption("examples") is None
    hypothesis.settings.register_profile(
        "ndlora", derandomize=fixed, database=None, deadline=None, print_blob=True
    )
    hypothesis.settings.load_profile("ndlora")


def pytest_collection_modifyitems(config, items):
    # a function with parameters is several items
    functions = {item.obj: item.get_closest_marker("examples") for item in items if hasattr(item, "obj")}
    for function, marker in functions.items():
        if marker is not None:
            hypothesis.settings(max_examples=config.getoption("examples") or marker.args[0])(function)


def pytest_collection_finish():
    gc.freeze()  # what was imported lives on: no collection looks through it again


def seed(number):
    """`torch.manual_seed`, which also formats the stack for every kind of device that is not in use yet."""
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(number)


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test starts from the same global generator."""
    seed(0)


@pytest.fixture
def fields_of():
    """A function: a method's name -> the fields of `NdLoraConfig` that say it."""
    return lambda method: {"method": method, **NEEDED.get(method, {})}


def copies(make):
    """`make`, that runs once for the same arguments; what it made is copied, in half the time."""
    made = {}

    def copied(seed=0, dtype=torch.float32, **changes):
        key = (seed, dtype, torch.get_default_device(), *sorted(changes.items()))
        if key not in made:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                made[key] = make(**changes).to(dtype).eval()
        return copy.deepcopy(made[key])

    return copied


@pytest.fixture(scope="session")
def make_llama():
    """A function that makes the same tiny Llama every time: hidden 48, two layers, float32, eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**changes):
        options = {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 128,
        }
        return LlamaForCausalLM(LlamaConfig(**{**options, **changes}))

    return copies(make)


@pytest.fixture
def transformers_adapters(make_llama):
    """Skips where transformers refuses adapters beside this PEFT: PEFT's own LoRA is refused then too."""
    from peft import LoraConfig, __version__
    from transformers import __version__ as transformers_version

    try:
        make_llama().add_adapter(LoraConfig(target_modules=["q_proj"]))
    except (ValueError, ImportError) as error:
        pytest.skip(f"transformers {transformers_version} and PEFT {__version__} forbid each other: {error}")


@pytest.fixture(scope="session")
def save_tiny_model():
    """A function that saves a tiny random Llama, with a tokenizer trained on `texts`, as any model is saved."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    def save(directory, texts, chat_template=None, **changes):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        specials = ["<unk>", "<s>", "</s>", "<pad>"]
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=320, special_tokens=specials))
        names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), specials, strict=True))
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
        fast.chat_template = chat_template
        fast.save_pretrained(directory)
        options = {
            "vocab_size": len(fast),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 3,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(**{**options, **changes})).save_pretrained(directory)
        return directory

    return save


@pytest.fixture(scope="session")
def make_gpt2():
    """The same for GPT-2, whose linear layers are transformers' Conv1D."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return copies(lambda: GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=128)))


@pytest.fixture
def stranger():
    """A function that brings in a method, a schedule, or a file of tests/strangers by its name, until the test ends."""
    from ndlora_plugins import hookimpl, register_plugin, unregister_plugin
    from ndlora_plugins.methods import Method
    from ndlora_plugins.schedules import Schedule

    class Plugin:
        def __init__(self, record):
            self.record = record

        @hookimpl
        def ndlora_methods(self):
            return [self.record] if isinstance(self.record, Method) else []

        @hookimpl
        def ndlora_schedules(self):
            return [self.record] if isinstance(self.record, Schedule) else []

    brought = []

    def bring(method):
        plugin = Plugin(method)
        if isinstance(method, str):
            spec = importlib.util.spec_from_file_location(method, ROOT / f"tests/strangers/{method}.py")
            plugin = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(plugin)
        register_plugin(plugin, name=f"stranger {len(brought)}")
        brought.append(plugin)
        return plugin

    yield bring
    for plugin in brought:
        unregister_plugin(plugin)


@pytest.fixture
def tokens():
    """Input ids (2, 10) for the tiny models."""
    return torch.arange(20).view(2, 10)


@pytest.fixture
def shake():
    """A function that moves every trainable parameter of a model by noise, as training would."""

    def move(model, scale=0.1, seed=1):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                    parameter.add_(scale * noise.to(parameter.dtype))
        return model

    return move


@pytest.fixture
def no_warnings():
    """Turns every warning of ours into an error."""
    from ndlora_plugins.errors import NdLoraWarning

    with warnings.catch_warnings():
        warnings.simplefilter("error", NdLoraWarning)
        yield
