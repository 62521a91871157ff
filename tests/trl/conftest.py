"""A tiny random Llama with a tokenizer of its own, and data in the forms that TRL's trainers take."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from representative import each

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k.jsonl"
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}user: {{ message['content'] }} </s> "
    "{% else %}"
    "assistant: {% generation %}{{ message['content'] }} </s>{% endgeneration %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


# method -> NdLoraConfig's arguments
METHODS = {
    "crossed": {"r": 2},
    "ndlinear": {"method": "ndlinear", "r": 2},
    "slora": {"method": "slora", "r": 4},
    "nlora": {"init_lora_weights": "n_lora", "r": 4},
    "inttune": {"method": "inttune", "r": 8},
}
METHODS = {name: METHODS[name] for name in each(METHODS)}


@pytest.fixture(params=METHODS)
def method_name(request):
    """Each method's name."""
    return request.param


@pytest.fixture
def method(method_name):
    """Each method, as arguments of NdLoraConfig."""
    return METHODS[method_name]


@pytest.fixture(scope="session")
def all_methods():
    """Method -> NdLoraConfig's arguments."""
    return METHODS


@pytest.fixture
def one_thread():
    """More threads only get into each other's way in matrices of 32 x 48."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def problems():
    """48 dicts of question and answer: GSM8K's where it is there."""
    if GSM8K.is_file():
        lines = GSM8K.read_text(encoding="utf-8").splitlines()[:48]
        return [json.loads(line) for line in lines]
    return [
        {
            "question": f"Tom has {i} apples and buys {j}. How many has he?",
            "answer": f"{i} + {j} = {i + j} apples",
        }
        for i in range(6)
        for j in range(8)
    ]


@pytest.fixture(scope="session")
def base(problems, save_tiny_model, tmp_path_factory):
    """Directory of the base model and its tokenizer."""
    texts = [f"user: {problem['question']} assistant: {problem['answer']}" for problem in problems]
    return str(save_tiny_model(tmp_path_factory.mktemp("base"), texts, TEMPLATE, initializer_range=0.2))


@pytest.fixture
def tokenizer(base):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


@pytest.fixture
def model(base):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def _dialogue(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="session")
def datasets_by_form(problems):
    """Form -> `datasets.Dataset` as the trainers want it: so few rows that each batch has them all."""
    from datasets import Dataset

    questions = [problem["question"][:120] for problem in problems[:8]]
    answers = [problem["answer"][:80] for problem in problems[:8]]
    turned = answers[::-1]
    rows = list(zip(questions, answers, turned, strict=True))
    forms = {
        "text": [{"text": f"{question} {answer}"} for question, answer, _ in rows],
        "messages": [{"messages": _dialogue(question, answer)} for question, answer, _ in rows],
        "prompt": [{"prompt": question} for question in questions],
        "preference": [{"prompt": q, "chosen": good, "rejected": bad} for q, good, bad in rows],
        "unpaired": [
            {"prompt": q, "completion": good if i % 2 else bad, "label": bool(i % 2)}
            for i, (q, good, bad) in enumerate(rows)
        ],
    }
    return {form: Dataset.from_list(examples) for form, examples in forms.items()}


@pytest.fixture
def options(tmp_path, one_thread):
    """Arguments that every trainer's configuration takes: few steps, full precision, nothing sent away."""
    return {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 3,
    }


@pytest.fixture(scope="session")
def fingerprint():
    """Function from a model to a hash of the bytes of its base weights, adapters and copies left out."""

    def of(model):
        digest = hashlib.blake2b()
        for name, tensor in sorted(
            model.named_parameters(), key=lambda item: item[0].replace("base_layer.", "")
        ):
            if not any(
                part in name for part in ("ndlora_", "modules_to_save.", "token_adapter.trainable_tokens")
            ):
                digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    return of


@pytest.fixture(scope="session")
def losses():
    """Function from a trainer to its logged losses."""
    return lambda trainer: [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="session")
def losses_of():
    """Function from a checkpoint's directory to its logged losses."""

    def read(checkpoint):
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    return read


@pytest.fixture
def make(model, options):
    """Function (config's arguments, callbacks, ...) -> a plain Trainer."""
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    from ndlora_plugins import NdLoraConfig

    def build(method, *callbacks, before=None, also=(), evaluate=False, **more):
        config = {"target_modules": "all-linear", "random_seed": 1, **method}
        rows = [
            {"input_ids": list(range(5 + i, 25 + i)), "labels": list(range(5 + i, 25 + i))} for i in range(8)
        ]
        adapted = get_peft_model(model, NdLoraConfig(**config)) if "r" in config else model
        if before is not None:
            before(adapted)
        arguments = TrainingArguments(**{**options, **more})
        data = {"train_dataset": rows, "eval_dataset": rows if evaluate else None}
        return Trainer(adapted, arguments, callbacks=[*also, *callbacks], **data)

    return build
