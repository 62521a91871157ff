"""Asks a running server whether it serves an adapter. Speaks the completions of OpenAI's protocol."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from ndlora_plugins.errors import NdLoraValueError

from .self_test import Probe, read_self_test

__all__ = ["Verdict", "verify_server"]

# As near as this part of the way from the base to the adapter: what another dtype or a quantised base brings is less,
# half of the layers or half of the scale is more.
_NEAR = 0.2
_ALIKE = 1 / 3  # of the greedy answers, at least: near-ties may turn the others
_LOGPROBS = 5  # what every server gives
_FEWEST = 8  # log-probabilities that a verdict needs


@dataclass(frozen=True)
class Verdict:
    """The answer to what a server serves.

    Attributes:
        serves: "adapter", "base" or "something else".
        to_adapter, to_base: root mean square of the differences between the server's log-probabilities of the answers'
            first tokens and the self-test's, in nats.
        between: the same between adapter and base.
        equal_answers: of `prompts`, those whose greedy tokens read as the adapter's.
        difference: the first prompt that is answered otherwise, in a sentence; "" if none is.
    """

    serves: str
    to_adapter: float
    to_base: float
    between: float
    equal_answers: int
    prompts: int
    difference: str

    def __str__(self):
        answers = f"{self.equal_answers} of {self.prompts} answers are the adapter's"
        return (
            f"The server serves {'the ' if self.serves != 'something else' else ''}{self.serves}: its "
            f"log-probabilities are {self.to_adapter:.3f} nats from the adapter's and {self.to_base:.3f} from the "
            f"base's, which are {self.between:.3f} apart; {answers}. "
            f"{self.difference}"
        ).rstrip()


def verify_server(
    directory: str | Path,
    url: str,
    model: str,
    *,
    body: Mapping[str, Any] | None = None,
    timeout: float = 120.0,
) -> Verdict:
    """Send the prompts of an export's self-test to a server and compare its answers.

    Args:
        directory: of an export with a self-test.
        url: of the server's API, such as http://127.0.0.1:8000/v1.
        model: the name under which it serves the adapter.
        body: further fields of each request, such as llama.cpp's {"lora": [{"id": 0, "scale": 1.0}]}.
        timeout: seconds for one request.

    Raises:
        NdLoraValueError: no self-test, no server, another protocol, no such model, or no log-probabilities.
    """
    probes = read_self_test(directory)
    answers = []
    for probe in probes:
        request = {
            "model": model,
            "prompt": list(probe.tokens),
            "max_tokens": max(len(answer.tokens) for answer in (probe.adapter, probe.base)),
            "temperature": 0,
            "logprobs": _LOGPROBS,
            "return_tokens_as_token_ids": True,  # vLLM's: else tokens that read alike are mixed up
            **(body or {}),
        }
        answers.append(_ask(url.rstrip("/"), model, request, timeout))
    return _judge(probes, answers, url)


def _ask(url: str, model: str, request: Mapping[str, Any], timeout: float) -> tuple[str, dict[Any, float]]:
    """The answer's text, and token or its text -> log-probability, of its first token."""
    try:
        status, said = _send(f"{url}/completions", timeout, request)
    except (OSError, ValueError, HTTPException) as error:
        raise NdLoraValueError(
            f"No server answers at {url}: {error}. Start it, or give its address with --url, such as "
            f"http://127.0.0.1:8000/v1."
        ) from error
    if status == 404 or (400 <= status < 500 and model in said):
        raise NdLoraValueError(
            f"The server at {url} has no model {model!r} at /completions. {_models(url, timeout)}"
        )
    try:
        choice = json.loads(said)["choices"][0]
        text, found = choice["text"], choice.get("logprobs")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise NdLoraValueError(
            f"{url}/completions does not speak OpenAI's protocol: HTTP {status}, {said[:200]!r}."
        ) from error
    first = _first_log_probabilities(found)
    if not first:
        raise NdLoraValueError(
            f"The server at {url} gives no log-probabilities: a verdict needs them. Allow them (vLLM: --max-logprobs)."
        )
    return text, first


def _models(url: str, timeout: float) -> str:
    try:
        names = [each["id"] for each in json.loads(_send(f"{url}/models", timeout)[1])["data"]]
    except (OSError, ValueError, HTTPException, LookupError, TypeError):
        return "Give the address of its API with --url, such as http://127.0.0.1:8000/v1."
    return f"It has {', '.join(map(repr, names))}: give one with --model."


def _send(url: str, timeout: float, body: Mapping[str, Any] | None = None) -> tuple[int, str]:
    """Status and text of what a server says, to a POST where there is a body; by no proxy."""
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"Content-Type": "application/json"})
    try:
        with build_opener(ProxyHandler({})).open(request, timeout=timeout) as response:
            return response.status, response.read().decode(errors="replace")
    except HTTPError as error:
        return error.code, error.read().decode(errors="replace")


def _first_log_probabilities(found: Any) -> dict[Any, float]:
    """Of the answer's first token, as OpenAI's completions have them (vLLM) or its chats (llama.cpp)."""
    try:
        if "content" in found:
            return {
                entry.get("id", entry["token"]): float(entry["logprob"])
                for entry in found["content"][0]["top_logprobs"]
            }
        return {
            int(token.removeprefix("token_id:")) if token.startswith("token_id:") else token: float(value)
            for token, value in found["top_logprobs"][0].items()
        }
    except (LookupError, TypeError, ValueError, AttributeError):
        return {}


def _judge(probes: Sequence[Probe], answers: Sequence[tuple[str, dict[Any, float]]], url: str) -> Verdict:
    to_adapter, to_base, between, difference = [], [], [], ""
    equal = {"adapter": 0, "base": 0}
    for probe, (text, first) in zip(probes, answers, strict=True):
        by_text = {entry[0]: token for token, entry in probe.first.items()}
        for token, value in first.items():
            known = probe.first.get(token if isinstance(token, int) else by_text.get(token, -1))
            if known is not None and math.isfinite(value):
                to_adapter.append(value - known[1])
                to_base.append(value - known[2])
                between.append(known[1] - known[2])
        equal["base"] += text == probe.base.text
        equal["adapter"] += text == probe.adapter.text
        if text != probe.adapter.text and not difference:
            difference = (
                f"First difference: after {probe.prompt!r} it says {text!r}, the adapter {probe.adapter.text!r}, the "
                f"base {probe.base.text!r}."
            )
    if len(to_adapter) < _FEWEST:
        raise NdLoraValueError(
            f"The server at {url} told {len(to_adapter)} log-probabilities of tokens that the self-test knows: too "
            f"few. Is it another base model?"
        )
    size = {"adapter": _root_mean_square(to_adapter), "base": _root_mean_square(to_base)}
    apart = _root_mean_square(between)
    nearest = min(size, key=lambda name: size[name])
    sure = size[nearest] <= _NEAR * apart and equal[nearest] >= _ALIKE * len(probes)
    serves = nearest if sure else "something else"
    return Verdict(serves, size["adapter"], size["base"], apart, equal["adapter"], len(probes), difference)


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(sum(value * value for value in values) / len(values))
