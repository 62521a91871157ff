"""Run by the interpreter of vLLM's environment: what many adapters cost in one engine.

Its argument is JSON, what `main` takes; so is a line that it prints, {"empty": ...}.
"""

from __future__ import annotations

import json
import statistics
import sys
import time


def main(base: str, adapters: list[str], rank: int, slots: int, prompt: list[list[int]], new: int) -> None:
    """Memory before and after all are loaded, seconds to load one, and of a batch with none, one, and one a prompt.

    Args:
        rank, slots: `--max-lora-rank` and `--max-loras`.
        prompt: tokens of each; `new` more are generated.
    """
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    engine = LLM(
        base, enable_lora=True, max_lora_rank=rank, max_loras=slots, max_cpu_loras=len(adapters), dtype="float32",
        enforce_eager=True, max_model_len=64, max_num_seqs=slots, skip_tokenizer_init=True,
    )  # fmt: skip
    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": tokens} for tokens in prompt]
    requests = [LoRARequest(f"adapter-{k}", k + 1, path) for k, path in enumerate(adapters)]

    def generate(chosen: list[LoRARequest] | None) -> float:
        begun = time.perf_counter()
        engine.generate(prompts, sampling, lora_request=chosen, use_tqdm=False)
        return time.perf_counter() - begun

    generate(None)
    empty, loads = resident(), []
    for request in requests:
        begun = time.perf_counter()
        engine.llm_engine.add_lora(request)
        loads.append(time.perf_counter() - begun)
    full = resident()
    ways = {"base": None, "one": [requests[0]] * len(prompts), "eight": requests[: len(prompts)]}
    seconds = {way: [] for way in ways}
    for _ in range(6):
        for way, chosen in ways.items():
            seconds[way].append(generate(chosen))
    print(json.dumps({
        "empty": empty, "adapters": full - empty, "load": statistics.median(loads),
        "seconds": {way: times[1:] for way, times in seconds.items()},  # the first turn warms up
    }))  # fmt: skip


def resident() -> int:
    """Bytes of this process and those that it started, a page that several share in parts."""
    import psutil

    own = psutil.Process()
    return sum(process.memory_full_info().pss for process in (own, *own.children(recursive=True)))


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
