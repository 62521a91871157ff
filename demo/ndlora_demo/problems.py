"""Arithmetic word problems for the demo: written by a seeded generator, with worked answers.

A problem is a question and an answer that works it out, one step a line, and ends in ``#### <number>``, the
final marker that GSM8K uses too. Training and held-out problems never share a template together with its
numbers (names and things may repeat), whatever the seeds: a model cannot score by having seen the sum.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["FINAL_MARKER", "Problem", "final_answer", "generate"]

FINAL_MARKER = "####"
_HELD_OUT_SHARE = 5  # one combination of template and numbers in five is kept for the evaluation
_NAMES = (
    "Ada",
    "Ben",
    "Chloe",
    "David",
    "Emma",
    "Felix",
    "Grace",
    "Hugo",
    "Iris",
    "Jack",
    "Lena",
    "Maya",
    "Noah",
    "Olga",
    "Peter",
    "Ruth",
    "Sam",
    "Tina",
    "Victor",
    "Zoe",
)
_THINGS = (
    "apples",
    "books",
    "buttons",
    "cards",
    "coins",
    "cookies",
    "eggs",
    "marbles",
    "pencils",
    "shells",
    "stamps",
    "stickers",
)
_BOXES = ("bags", "baskets", "boxes", "drawers", "jars", "tins")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Problem:
    """A question and its worked answer, which ends in ``#### <number>``."""

    question: str
    answer: str


@dataclass(frozen=True)
class _Template:
    """A text with blanks, the operators applied from left to right, and a source of numbers.

    ``numbers`` draws one number more than there are operators; all results stay whole and not negative.
    """

    text: str
    operators: str
    numbers: Callable[[random.Random], tuple[int, ...]]


def _sum(rng: random.Random) -> tuple[int, ...]:
    return rng.randint(3, 20), rng.randint(2, 20)


def _difference(rng: random.Random) -> tuple[int, ...]:
    first = rng.randint(10, 30)
    return first, rng.randint(2, first - 1)


def _product(rng: random.Random) -> tuple[int, ...]:
    return rng.randint(2, 9), rng.randint(2, 9)


def _quotient(rng: random.Random) -> tuple[int, ...]:
    share, people = rng.randint(2, 9), rng.randint(2, 9)
    return share * people, people


def _sum_less(rng: random.Random) -> tuple[int, ...]:
    first, second = _sum(rng)
    return first, second, rng.randint(1, first + second - 1)


def _product_more(rng: random.Random) -> tuple[int, ...]:
    return *_product(rng), rng.randint(2, 20)


def _product_less(rng: random.Random) -> tuple[int, ...]:
    first, second = _product(rng)
    return first, second, rng.randint(1, first * second - 1)


_TEMPLATES = (
    _Template(
        "{name} has {0} {things} and gets {1} more from {other}. How many {things} does {name} have now?",
        "+",
        _sum,
    ),
    _Template(
        "There are {0} {things} on the table and {1} {things} on the shelf. How many {things} are "
        "there together?",
        "+",
        _sum,
    ),
    _Template(
        "{name} has {0} {things} and gives {1} of them to {other}. How many {things} are left?",
        "-",
        _difference,
    ),
    _Template(
        "{name} needs {0} {things} and already has {1}. How many more {things} does {name} need?",
        "-",
        _difference,
    ),
    _Template("{name} fills {0} {boxes} with {1} {things} each. How many {things} is that?", "*", _product),
    _Template(
        "{name} buys {0} {things} at {1} dollars each. How many dollars does {name} pay?", "*", _product
    ),
    _Template(
        "{name} shares {0} {things} equally among {1} friends. How many {things} does each friend get?",
        "/",
        _quotient,
    ),
    _Template(
        "{name} has {0} {things}, finds {1} more and then loses {2}. How many {things} does {name} have now?",
        "+-",
        _sum_less,
    ),
    _Template(
        "{name} has {0} {boxes} with {1} {things} each, and {2} more {things} in a bowl. How many "
        "{things} does {name} have?",
        "*+",
        _product_more,
    ),
    _Template(
        "{name} packs {0} {boxes} with {1} {things} each and sells {2} of the {things}. How many "
        "{things} are left?",
        "*-",
        _product_less,
    ),
)
_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "/": lambda left, right: left // right,
}


def _worked_answer(operators: str, numbers: tuple[int, ...]) -> str:
    """The steps, one a line, then the final marker and the result."""
    result, lines = numbers[0], []
    for operator, number in zip(operators, numbers[1:], strict=True):
        before, result = result, _OPERATIONS[operator](result, number)
        lines.append(f"{before} {operator} {number} = {result}")
    return "\n".join([*lines, f"{FINAL_MARKER} {result}"])


def generate(count: int, seed: int, *, held_out: bool = False) -> list[Problem]:
    """Write ``count`` different problems.

    Args:
        count: how many problems, 1 to 5,000.
        seed: the same seed gives the same problems; Python's global generator is left alone.
        held_out: False draws from the combinations of template and numbers meant for training, True from the
            others (about one in five). The two never meet, whatever the seeds.

    Raises:
        ValueError: if ``count`` is out of range.
    """
    if not 1 <= count <= 5000:
        raise ValueError(f"count={count} is out of range: ask for 1 to 5,000 problems")
    rng = random.Random(f"ndlora problems {seed} {held_out}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        index = rng.randrange(len(_TEMPLATES))
        template = _TEMPLATES[index]
        numbers = template.numbers(rng)
        name, other = rng.sample(_NAMES, 2)
        words = {"name": name, "other": other, "things": rng.choice(_THINGS), "boxes": rng.choice(_BOXES)}
        if (zlib.crc32(repr((index, numbers)).encode()) % _HELD_OUT_SHARE == 0) != held_out:
            continue
        question = template.text.format(*numbers, **words)
        problems[question] = Problem(question, _worked_answer(template.operators, numbers))
    return list(problems.values())


def final_answer(text: str) -> str:
    """The final answer in a worked text, in a form that can be compared.

    What follows the first ``####`` counts; without one, the last number; without a number, the text itself.
    Numbers lose thousands commas, currency signs and idle decimals: ``"#### $1,200.00"`` gives ``"1200"``.
    """
    _, marker, rest = text.partition(FINAL_MARKER)
    numbers = _NUMBER.findall(rest) if marker else _NUMBER.findall(text)
    if not numbers:
        return (rest if marker else text).strip().lower()
    number = numbers[0 if marker else -1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number
