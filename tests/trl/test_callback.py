"""`NdLoraCallback` in transformers' plain Trainer: what it refuses, what it logs where, schedule, end."""

import math
import warnings

import pytest
import torch

from ndlora_plugins import NdLoraConfig
from ndlora_plugins.errors import NdLoraValueError, NdLoraWarning
from ndlora_plugins.integrations.trl import NdLoraCallback
from ndlora_plugins.integrations.trl.checks import adapted_layers, check_gradients, check_start
from ndlora_plugins.integrations.trl.norms import base_norm, delta_norm, update_norms

# method -> NdLoraConfig's arguments, trainable numbers: two layers of 32 -> 32, 16, 16, 32, 48, 48 and
# 48 -> 32; the modes are 32 = 4 x 8, 16 = 4 x 4, 48 = 6 x 8
METHODS = {
    "crossed": ({"r": 1}, 2 * 464),
    "ndlinear": ({"method": "ndlinear", "r": 1}, 2 * (2 * 80 + 2 * 48 + 3 * 88)),
    "slora": ({"method": "slora", "r": 4}, 2 * (4 * 464 + 7 * 16)),
    "nlora": ({"init_lora_weights": "n_lora", "r": 4}, 2 * (4 * 464 + 7 * 16)),
    "inttune": ({"method": "inttune", "r": 8}, 2 * 7 * 64),
}
# what is done to the model before training -> words of the error
FAULTS = {
    "base weight": (lambda model: _factor(model, "base_layer.weight").requires_grad_(), "base_layer.weight"),
    "frozen factor": (lambda model: _factor(model, "up").requires_grad_(False), "its plan says"),
    "everything frozen": (lambda model: model.requires_grad_(False), "is_trainable=True"),
    "merged": (lambda model: model.merge_adapter(), "unmerge_adapter"),
    "no adapter": (
        lambda model: model.unload() and model.base_model.model.requires_grad_(),
        "no NDLORA adapter",
    ),
}
NORM = "ndlora/default/update_norm"


def _factor(model, end):
    return next(parameter for name, parameter in model.named_parameters() if name.endswith(end))


@pytest.fixture
def recorder():
    """A tracker that a trainer has before our callback; `seen` are the logs it got."""
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen.append(dict(logs))

    return Recorder()


@pytest.mark.parametrize(("method", "numbers"), METHODS.values(), ids=METHODS)
def test_the_start_is_counted_against_the_plan(method, numbers, make):
    report = check_start(make(method).model)
    assert report.problems == () and report.besides == 0
    assert report.adapters["default"][1:] == (14, numbers)


def test_what_trains_beside_the_adapter_is_counted_apart(make):
    trainer = make({"r": 1, "modules_to_save": ["lm_head"], "trainable_token_indices": [3, 4]})
    report = check_start(trainer.model)
    assert report.problems == ()
    assert report.besides == trainer.model.config.vocab_size * 32 + 2 * 32


@pytest.mark.parametrize(("fault", "words"), FAULTS.values(), ids=FAULTS)
def test_a_fault_stops_the_training_before_it_starts(fault, words, make):
    trainer = make({"method": "slora", "r": 4}, NdLoraCallback(), before=fault)
    with pytest.raises(NdLoraValueError, match=words):
        trainer.train()
    assert trainer.state.global_step == 0


def test_not_strict_warns_and_goes_on(make):
    trainer = make({"r": 1}, NdLoraCallback(strict=False), before=FAULTS["base weight"][0])
    with pytest.warns(NdLoraWarning, match="base_layer.weight"):
        trainer.train()
    assert trainer.state.global_step == 4


def test_an_optimizer_without_the_factors_is_refused(make):
    trainer = make({"r": 1}, NdLoraCallback())
    trainer.optimizer = torch.optim.AdamW([_factor(trainer.model, "mode_1")])
    with pytest.raises(NdLoraValueError, match=r"27 trainable factors are in no group of the optimizer"):
        trainer.train()


def test_a_layer_that_the_forward_pass_does_not_use_is_named(make):
    def skip(model):
        model.base_model.model.model.layers[1].self_attn.forward = lambda hidden_states, **kwargs: (
            hidden_states,
            None,
        )

    trainer = make({"r": 1}, NdLoraCallback(), before=skip)
    with pytest.raises(NdLoraValueError, match=r"no gradient reached 8 .* model.layers.1.self_attn.q_proj"):
        trainer.train()


def test_a_gradient_that_is_not_finite_is_refused(make):
    trainer = make({"r": 1}, NdLoraCallback())
    _factor(trainer.model, "layers.0.mlp.up_proj.ndlora_factors.default.mode_1").register_hook(
        lambda g: g * math.nan
    )
    with pytest.raises(
        NdLoraValueError, match=r"28 trainable factors is NaN or infinite, .* clipping spreads"
    ):
        trainer.train()


def test_a_gradient_that_is_not_finite_is_named(make):
    model = make({"r": 1}).model
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    _factor(model, "layers.0.mlp.up_proj.ndlora_factors.default.mode_1").grad[0, 0, 0] = math.inf
    (problem,) = check_gradients(adapted_layers(model)).problems
    assert (
        "1 trainable factors is NaN or infinite, namely model.layers.0.mlp.up_proj (default, mode_1)"
        in problem
    )


def test_a_layer_whose_start_blocks_every_gradient_is_named(make):
    def block(model):
        for layer in (layer for name, layer in adapted_layers(model) if name.endswith("0.mlp.up_proj")):
            torch.nn.init.zeros_(layer.ndlora_factors["default"]["mode_2"])

    trainer = make({"r": 1}, NdLoraCallback(), before=block)
    with pytest.raises(NdLoraValueError, match=r"exactly zero in every factor of 1 layers, .*0.mlp.up_proj"):
        trainer.train()


def test_steps_without_any_gradient_are_no_fault_but_a_training_of_them_is_told(make):
    trainer = make({"r": 1}, NdLoraCallback())
    trainer.compute_loss = lambda model, inputs, **kwargs: model(**inputs).loss * 0.0
    with pytest.warns(NdLoraWarning, match="nothing was learned"):
        trainer.train()


@pytest.mark.step("NdLoraCallback: update norms", host="Trainer")
@pytest.mark.parametrize(("method", "numbers"), METHODS.values(), ids=METHODS)
def test_update_norms_are_those_of_the_materialised_updates(method, numbers, make):
    trainer = make(method, NdLoraCallback())
    trainer.train()
    ratios = []
    for _, layer in adapted_layers(trainer.model):
        norm = layer.get_delta_weight("default").norm().item()
        assert delta_norm(layer, "default") == pytest.approx(norm, rel=1e-4)
        ratios.append(norm / layer.get_base_weight().norm().item())
        assert base_norm(layer) == pytest.approx(layer.get_base_weight().norm().item())
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logged[-1][f"{NORM}_max"] == pytest.approx(max(ratios), rel=1e-4)
    assert logged[-1][NORM] == pytest.approx(torch.tensor(ratios).quantile(0.5).item(), rel=1e-4)
    assert logged[0][NORM] < logged[-1][NORM]


def test_trackers_that_come_before_the_callback_get_the_norms(make, recorder):
    every = {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "evaluate": True}
    trainer = make({"r": 1}, NdLoraCallback(), also=[recorder], **every)
    trainer.train()
    trainings = [logs for logs in recorder.seen if "loss" in logs]
    assert len(trainings) == 2 and all(NORM in logs for logs in trainings)
    assert not any(NORM in logs for logs in recorder.seen if "loss" not in logs)
    assert [logs[NORM] for logs in trainings] == [e[NORM] for e in trainer.state.log_history if "loss" in e]


def test_a_callback_added_later_reaches_the_trackers_too(make, recorder):
    trainer = make({"r": 1}, also=[recorder])
    trainer.add_callback(NdLoraCallback())
    trainer.train()
    assert NORM in recorder.seen[0]


def test_tensorboard_gets_the_norms(make, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    make({"r": 1}, NdLoraCallback(), report_to="tensorboard").train()
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    assert len(board.Scalars(f"train/{NORM}")) == 4


def test_two_adapters_are_logged_apart(make):
    trainer = make({"r": 1}, NdLoraCallback())
    trainer.model.add_adapter("second", NdLoraConfig(method="slora", r=4, target_modules=["q_proj"]))
    trainer.model.base_model.set_adapter(["default", "second"])
    trainer.train()
    assert trainer.state.log_history[0]["ndlora/second/update_norm"] > 0
    assert trainer.state.log_history[0][NORM] > 0


def test_a_layer_of_which_only_a_shard_is_here_is_left_out(make):
    layers = adapted_layers(make({"r": 1}).model)
    norms = {name: base_norm(layer) for name, layer in layers}
    layers[0][1].get_base_layer().weight.data = torch.empty(0)  # as ZeRO-3 does
    assert base_norm(layers[0][1]) == 0.0
    assert update_norms(layers, {name: 0.0 for name in norms}) == {}
    assert update_norms(layers, {**norms, layers[0][0]: 0.0})[NORM] == 0.0


def test_norms_can_be_left_out(make):
    trainer = make({"r": 1}, NdLoraCallback(log_norms=False))
    trainer.train()
    assert not any(key.startswith("ndlora/") for entry in trainer.state.log_history for key in entry)


def test_no_warning_of_ours_in_a_sound_run(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error", NdLoraWarning)
        make({"r": 1}, NdLoraCallback()).train()
