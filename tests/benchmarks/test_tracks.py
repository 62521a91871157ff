"""The tracks' benchmark: that the whole field can be attached, and that its page is of its runs."""

import json
import pathlib
import sys
from importlib.util import find_spec

import pytest
import torch
from torch import nn

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tracks():
    """The package, which is not installed: it lies in the root."""
    sys.path.append(str(ROOT))
    yield pytest.importorskip("benchmarks.tracks")
    sys.path.remove(str(ROOT))


def made(losses, name="a", parameters=8, peft_type="NDLORA"):
    """Lines of results as `track.run` gives them."""
    return [
        {
            "setting": {"name": name, "peft_type": peft_type, "options": {}},
            "learning_rate": rate,
            "seed": seed,
            "parameters": parameters,
            "validation_loss": loss,
            "held_out_loss": loss,
            "forgetting": 0.0,
        }
        for (rate, seed), loss in losses.items()
    ]


class Small(nn.Module):
    """A block with the shapes and names of the images' layers."""

    def __init__(self):
        super().__init__()
        block = nn.ModuleDict(
            {name: nn.Linear(*size) for name, size in {
                "q_proj": (128, 128), "k_proj": (128, 128), "v_proj": (128, 128), "o_proj": (128, 128),
                "fc1": (128, 512), "fc2": (512, 128),
            }.items()}
        )  # fmt: skip
        self.blocks, self.head = nn.ModuleList([block]), nn.Linear(128, 2)

    def forward(self, x):
        for layer in self.blocks[0].values():
            x = layer(x)
        return self.head(x)


class SmallTrack:
    name, about = "small", {}

    def __init__(self):
        torch.manual_seed(0)
        self.model = Small().requires_grad_(False)

    def batches(self, seed):
        return [torch.randn(4, 128, generator=torch.Generator().manual_seed(seed))] * 2

    def loss(self, model, batch):
        return model(batch).pow(2).mean()

    def evaluate(self, model):
        loss = self.loss(model, self.batches(9)[0]).item()
        return {"validation_loss": loss, "held_out_loss": loss}


def test_every_setting_runs(tracks):
    from benchmarks.runs import Run
    from benchmarks.tracks.settings import settings_for
    from benchmarks.tracks.track import run

    small, wavelets = SmallTrack(), find_spec("pywt") is not None
    settings = [each for each in settings_for("images") if wavelets or each.peft_type != "WAVEFT"]
    found = {setting.name: run(small, Run(setting, 1e-3, 0)) for setting in settings}
    assert [name for name, result in found.items() if result["held_out_loss"] is None] == []
    assert [name for name, result in found.items() if not result["parameters"]] == ["head alone"]
    assert all(json.dumps(result) for result in found.values())


def test_the_queue_gives_each_setting_a_run_in_turn_and_goes_on(tracks, monkeypatch, tmp_path):
    from benchmarks.runs import Setting
    from benchmarks.tracks import __main__ as command

    rank = {"r": 1, "lora_alpha": 2}
    settings = [Setting("none", "NONE", {}, 1e-3, seeds=(0,))]
    settings += [Setting(name, "LORA", rank, 1e-3, tried=2, seeds=(0, 1)) for name in "ab"]
    monkeypatch.setattr(command, "TRACKS", {"small": lambda data: SmallTrack()})
    monkeypatch.setattr(command, "settings_for", lambda track: settings)
    path = tmp_path / "small.jsonl"
    command.main("small", tmp_path, tmp_path)
    lines = path.read_text().splitlines(keepends=True)
    assert [json.loads(line)["setting"]["name"] for line in lines] == ["none", *"ababab"]
    path.write_text("".join(lines[:3]) + lines[3][:40])  # killed in the middle of a line
    command.main("small", tmp_path, tmp_path)
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["learning_rate"], line["seed"]) for line in again] == [
        (line["learning_rate"], line["seed"]) for line in map(json.loads, lines)
    ]


@pytest.fixture(scope="module")
def sums(tracks, save_tiny_model, tmp_path_factory):
    """(function that makes the track of reinforcement learning with a tiny random model, its folder)."""
    pytest.importorskip("trl")
    from benchmarks.tracks.rl import Arithmetic, Sizes
    from ndlora_demo.problems import generate

    texts = [f"Question: {problem.question}\nAnswer: {problem.answer}" for problem in generate(300, 0)]
    model = str(save_tiny_model(tmp_path_factory.mktemp("tiny"), texts))
    data = tmp_path_factory.mktemp("data")
    sizes = Sizes(
        warm_up=4, warm_up_rate=1e-2, steps=2, prompts=2, generations=2, tokens=6, validation=4, held_out=4
    )
    return lambda: Arithmetic(data, model, sizes, ["Ada has 3 eggs.", "How many coins is that?"]), data


def test_reinforcement_runs_with_every_setting_and_leaves_the_base_as_it_was(sums):
    from benchmarks.runs import Run
    from benchmarks.tracks.settings import settings_for

    track = sums[0]()
    before = {name: value.clone() for name, value in track.model.state_dict().items()}
    found = {each.name: track.run(Run(each, 1e-2, 0)) for each in settings_for("rl")}
    assert all(json.dumps(result) and 0 <= result["held_out_loss"] <= 1 for result in found.values())
    steps = {name: len(result["rewards"]) for name, result in found.items()}
    assert steps == {name: 2 * (name != "no training") for name in found}
    assert found["no training"]["forgetting"] == 0
    assert all(torch.equal(value, before[name]) for name, value in track.model.state_dict().items())


def test_reinforcement_is_the_same_again_with_the_same_seed(sums, monkeypatch):
    from benchmarks.runs import Run
    from benchmarks.tracks import rl
    from benchmarks.tracks.settings import settings_for

    # a tiny random model is never right: a reward that differs, so that it learns
    monkeypatch.setattr(rl, "_rewards", lambda completions, **_: [float(len(each)) for each in completions])
    setting = settings_for("rl")[1]
    monkeypatch.setattr(rl.Arithmetic, "_right", lambda *_, **__: 0.0)
    first, again, other = (sums[0]().run(Run(setting, 1e-1, seed)) for seed in (0, 0, 1))
    assert first["forgetting"] == again["forgetting"] != 0
    assert first["rewards"] == again["rewards"] != other["rewards"]
    assert len(list(sums[1].glob("*.safetensors"))) == 1  # the warm-up was done once


def test_rewards_are_shown_as_far_as_they_are_there(tracks):
    from benchmarks.tracks.report import reward_table

    results = made({(1e-3, 0): 0.25, (1e-3, 1): 0.75}, "LoRA r=8", 800, "LORA")
    results += made({(1e-3, 0): 0.5}, "crossed", 100)
    line = next(line for line in reward_table(results).splitlines() if "**crossed**" in line)
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1:7] == ["100", "1/8", "0.001", "1", "0.500", "-0.250"]


def test_the_best_of_a_budget_is_the_best_in_validation(tracks):
    from benchmarks.tracks.rows import best_within, rows

    seeds = [(3e-3, seed) for seed in range(5)]
    results = made(dict.fromkeys(seeds, 2.0), "small", 8) + made(dict.fromkeys(seeds, 1.0), "large", 16)
    found = rows(results)
    assert [best_within(found, size).setting for size in (8, 16)] == ["small", "large"]
    assert best_within(found, 7) is None


def test_the_pages_and_the_table_that_ships_are_of_the_results(tracks):
    from benchmarks.tracks import known, report

    for file in report.PAGES:
        assert report.page(file.read_text()) == file.read_text()
    assert json.loads(known.FILE.read_text()) == known.known(report.field_results(), report.LANGUAGE)
