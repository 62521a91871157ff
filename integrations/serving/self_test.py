"""The self-test: what a base model answers with an adapter and without it, kept beside an export."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ndlora_plugins.errors import NdLoraValueError

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = [
    "PROMPTS",
    "SELF_TEST_FILE",
    "Answer",
    "Probe",
    "make_self_test",
    "read_self_test",
    "write_self_test",
]

SELF_TEST_FILE = "self_test.json"
FORMAT = 1
PROMPTS = (
    "Question: Tom has 12 apples and buys 5 more. How many apples does he have?\nAnswer:",
    "Question: A train goes 60 miles in one hour. How far does it go in three hours?\nAnswer:",
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):\n",
    "Dear Sir or Madam,\n",
    "The three primary colours are",
    "Translate to German: Good morning.\n",
    "Water boils at",
    "In 1969, the first",
    "A recipe for bread:\n1.",
    "User: What should I read next?\nAssistant:",
    "The opposite of hot is",
    "SELECT name FROM users WHERE",
    "My favourite season is",
    "To be or not to be,",
)
_ANSWER_TOKENS = 8
_MOST_LIKELY = 20  # of the first token, of each model: servers tell their first five or so
_SMALLEST_DIFFERENCE = 0.05  # nats: below it no server's answer tells the adapter from the base


@dataclass(frozen=True)
class Answer:
    """Greedy tokens, and what they read as."""

    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Probe:
    """One prompt.

    Attributes:
        tokens: what a server is sent.
        first: token -> (its text, log-probability with the adapter, without it), of the first token of the answer.
    """

    prompt: str
    tokens: tuple[int, ...]
    adapter: Answer
    base: Answer
    first: dict[int, tuple[str, float, float]]


def make_self_test(
    adapter: str | Path,
    base: str | Path,
    prompts: Sequence[str] = PROMPTS,
    *,
    trust_remote_code: bool = False,
) -> tuple[Probe, ...]:
    """Load base model and adapter with PEFT and answer the prompts with both.

    Args:
        base: directory or hub name of a causal language model; run in the dtype that it is stored in.

    Raises:
        NdLoraValueError: the adapter hardly changes what follows the prompts.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", trust_remote_code=trust_remote_code)
    model = PeftModel.from_pretrained(model, str(adapter)).eval()
    probes = tuple(_probe(model, tokenizer, prompt) for prompt in prompts)
    differences = [one - other for probe in probes for _, one, other in probe.first.values()]
    size = torch.tensor(differences).square().mean().sqrt().item()
    if size < _SMALLEST_DIFFERENCE:
        raise NdLoraValueError(
            f"The adapter moves the log-probabilities of the first token by {size:.2g} nats over {len(probes)} "
            f"prompts: too little for a self-test. Give prompts of the kind that it was trained on (--prompts)."
        )
    return probes


def write_self_test(probes: Sequence[Probe], directory: Path) -> None:
    """Write `self_test.json`."""
    content = {"format": FORMAT, "probes": [asdict(probe) for probe in probes]}
    (directory / SELF_TEST_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def read_self_test(directory: str | Path) -> tuple[Probe, ...]:
    """Read `self_test.json`.

    Raises:
        NdLoraValueError: it is not there, or no self-test of this format.
    """
    path = Path(directory, SELF_TEST_FILE)
    if not path.is_file():
        raise NdLoraValueError(
            f"{directory} has no {SELF_TEST_FILE}: export the adapter again with --self-test, and name that directory."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}")
        return tuple(_read_probe(probe) for probe in content["probes"])
    except (ValueError, KeyError, TypeError) as error:
        raise NdLoraValueError(
            f"{path} is no self-test of format {FORMAT}: {error}. Export the adapter again."
        ) from error


def _read_probe(content: dict[str, Any]) -> Probe:
    return Probe(
        prompt=content["prompt"],
        tokens=tuple(content["tokens"]),
        adapter=Answer(tuple(content["adapter"]["tokens"]), content["adapter"]["text"]),
        base=Answer(tuple(content["base"]["tokens"]), content["base"]["text"]),
        first={int(token): (text, one, other) for token, (text, one, other) in content["first"].items()},
    )


@torch.inference_mode()
def _probe(model: PeftModel, tokenizer: Any, prompt: str) -> Probe:
    tokens = tokenizer(prompt)["input_ids"]
    adapter, with_adapter = _answer(model, tokenizer, tokens)
    with model.disable_adapter():
        base, without = _answer(model, tokenizer, tokens)
    likely = {*with_adapter.topk(_MOST_LIKELY).indices.tolist(), *without.topk(_MOST_LIKELY).indices.tolist()}
    first = {
        token: (
            _behind(tokenizer, tokens, [token]),
            round(with_adapter[token].item(), 5),
            round(without[token].item(), 5),
        )
        for token in sorted(likely)
    }
    return Probe(prompt, tuple(tokens), adapter, base, first)


def _answer(model: PeftModel, tokenizer: Any, tokens: Sequence[int]) -> tuple[Answer, Tensor]:
    """The greedy answer, and the log-probabilities (vocabulary) of its first token."""
    prompt = torch.tensor([tokens])
    found = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=_ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    said = found.sequences[0, len(tokens) :].tolist()
    answer = Answer(tuple(said), _behind(tokenizer, tokens, said))
    return answer, found.logits[0][0].float().log_softmax(-1)


def _behind(tokenizer: Any, tokens: Sequence[int], said: Sequence[int]) -> str:
    """What tokens read as behind the prompt's, as servers do it: alone, some tokenizers drop a first space."""
    before, whole = (
        tokenizer.decode(each, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for each in ([*tokens], [*tokens, *said])
    )
    return whole[len(before) :]
