"""`NdLoraCallback`: the schedule, what it does at the end, what arguments it refuses."""

import pytest
import torch

from ndlora_plugins.errors import MissingExtraError, NdLoraTypeError, NdLoraValueError, NdLoraWarning
from ndlora_plugins.integrations.trl import NdLoraCallback

# wrong arguments of the callback -> error, words of it
ARGUMENTS = {
    "export to nowhere": (
        {"export": "onnx"},
        NdLoraValueError,
        "'lora', 'lokr', 'gguf', 'lycoris', 'merged'",
    ),
    "export without a kind": ({"export": {"directory": "x"}}, NdLoraValueError, "`to` has to be one of"),
    "export's option": ({"export": {"to": "lora", "ranks": 4}}, NdLoraValueError, r"\['ranks'\]. Known: to,"),
    "export of another type": ({"export": 3}, NdLoraTypeError, "export=3: give one of"),
    "plot into a directory": ({"plot": "."}, NdLoraValueError, "plot='.' is a directory"),
    "negative step": ({"core_only_at": -1}, NdLoraValueError, "core_only_at=-1"),
    "fraction above one": ({"core_only_at": 1.5}, NdLoraValueError, "core_only_at=1.5"),
}
# method and export -> the export, NdLoraConfig's arguments, for which it is exact
EXPORTS = {
    "inttune-lora": ("lora", {"method": "inttune", "r": 8}),
    "ndlinear-lokr": ("lokr", {"method": "ndlinear", "r": 1}),
    "nlora-merged": ("merged", {"method": "nlora", "r": 4}),
}


def _factor(model, end):
    return next(parameter for name, parameter in model.named_parameters() if name.endswith(end))


@pytest.fixture
def snapshots():
    """A callback that keeps the factors after each step; `moved(factor)` says in which steps it changed."""
    from transformers import TrainerCallback

    class Snapshots(TrainerCallback):
        def __init__(self):
            self.kept = []

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            factors = {name: value for name, value in model.named_parameters() if "ndlora_factors" in name}
            self.kept.append({name: value.detach().clone() for name, value in factors.items()})

        def on_step_end(self, args, state, control, model=None, **kwargs):
            self.on_train_begin(args, state, control, model=model)

        def moved(self, factor):
            pairs = list(zip(self.kept, self.kept[1:], strict=False))
            names = [name for name in self.kept[0] if name.endswith(factor)]
            return [
                any(not torch.equal(before[name], after[name]) for name in names) for before, after in pairs
            ]

    return Snapshots()


@pytest.mark.parametrize("core_only_at", [2, 0.5])
def test_from_the_given_step_on_only_the_cores_train(core_only_at, make, snapshots):
    method = {"method": "slora", "r": 4, "init_lora_weights": False}
    trainer = make(method, NdLoraCallback(core_only_at=core_only_at), snapshots)
    trainer.train()
    assert snapshots.moved("core") == [True] * 4
    assert snapshots.moved("up") == snapshots.moved("down") == [True, True, False, False]
    core = _factor(trainer.model, "core")
    assert trainer.optimizer.state[core]["step"] == 4
    assert trainer.optimizer.state[_factor(trainer.model, "up")]["step"] == 2
    assert core.requires_grad and _factor(trainer.model, "up")._backward_hooks in (None, {})


@pytest.mark.step("NdLoraCallback: core_only_at, resumed", host="Trainer", method="nlora")
def test_resume_inside_the_core_only_part_equals_the_uninterrupted_run(make, losses, tmp_path):
    method = {"init_lora_weights": "n_lora", "r": 4}
    steps = {"save_strategy": "steps", "save_steps": 3}
    whole = make(method, NdLoraCallback(core_only_at=2), output_dir=str(tmp_path / "whole"), **steps)
    whole.train()
    frozen = {
        name: value.clone() for name, value in whole.model.named_parameters() if name.endswith(("up", "down"))
    }
    whole.model = whole.model.unload()
    again = make(method, NdLoraCallback(core_only_at=2), output_dir=str(tmp_path / "again"))
    again.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-3"))
    assert losses(again) == losses(whole)
    assert all(
        torch.equal(value, dict(again.model.named_parameters())[name]) for name, value in frozen.items()
    )


def test_a_training_that_was_interrupted_changes_nothing_of_the_next(make, snapshots):
    from transformers import TrainerCallback

    class Interrupted(TrainerCallback):
        def on_step_end(self, *_, **__):
            raise KeyboardInterrupt

    method = {"method": "slora", "r": 4, "init_lora_weights": False}
    first = make(method, NdLoraCallback(core_only_at=0), Interrupted())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    trainer = make({}, NdLoraCallback(), snapshots)  # on the same model
    trainer.train()
    assert snapshots.moved("up") == [True] * 4


def test_a_method_without_a_core_is_refused(make):
    with pytest.raises(NdLoraValueError, match=r"core_only_at=2: adapter 'default' on layer .* have no core"):
        make({"r": 1}, NdLoraCallback(core_only_at=2)).train()


@pytest.mark.step("NdLoraCallback: export", host="Trainer")
@pytest.mark.parametrize(("kind", "method"), EXPORTS.values(), ids=EXPORTS)
def test_the_export_is_the_trained_model(kind, method, make, base):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    trainer = make(method, NdLoraCallback(export=kind))
    trainer.train()
    written = f"{trainer.args.output_dir}/{kind}"
    loaded = AutoModelForCausalLM.from_pretrained(written if kind == "merged" else base)
    if kind != "merged":
        loaded = PeftModel.from_pretrained(loaded, written)
        assert loaded.peft_config["default"].peft_type == kind.upper()
    tokens = torch.tensor([[5, 20, 33, 47]])
    with torch.no_grad():
        expected = trainer.model.eval()(tokens).logits
        torch.testing.assert_close(loaded.eval()(tokens).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("transformers_adapters")
def test_a_mapping_names_the_directory_and_the_adapter_that_transformers_added(make, model, tmp_path):
    from ndlora_plugins import NdLoraConfig

    model.add_adapter(NdLoraConfig(method="slora", r=2, target_modules=["q_proj"]), adapter_name="mine")
    export = {"to": "lora", "directory": str(tmp_path / "plain")}
    make({}, NdLoraCallback(export=export)).train()
    assert (tmp_path / "plain/adapter_model.safetensors").is_file()


def test_an_export_that_fails_loses_nothing(make, tmp_path):
    trainer = make({"r": 2}, NdLoraCallback(export="lokr"))
    with pytest.warns(NdLoraWarning, match="the export failed, the training did not .*`ndlora export`"):
        trainer.train()
    assert trainer.state.global_step == 4
    trainer.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


def test_a_plot_that_fails_loses_nothing(make, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    trainer = make({"r": 2}, NdLoraCallback(plot=tmp_path / "file/run.png"))
    with pytest.warns(NdLoraWarning, match="the plot failed, the training did not"):
        trainer.train()
    assert trainer.state.global_step == 4


def test_an_export_over_something_is_refused_before_the_first_step(make, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()
    trainer = make({"r": 1}, NdLoraCallback(export={"to": "lora", "directory": tmp_path / "there"}))
    with pytest.raises(NdLoraValueError, match="exists already"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_callable_and_plot_come_at_the_end(make, tmp_path):
    pytest.importorskip("matplotlib")
    exported = []
    callback = NdLoraCallback(export=lambda *given: exported.append(given), plot=tmp_path / "plots/run.png")
    trainer = make({"r": 1}, callback)
    trainer.train()
    assert exported == [(trainer.model, trainer.args)]
    assert (tmp_path / "plots/run.png").read_bytes().startswith(b"\x89PNG")


def test_only_the_main_process_writes(make, tmp_path):
    exported = []
    callback = NdLoraCallback(export=lambda *given: exported.append(given), plot=tmp_path / "run.png")
    trainer = make({"r": 1}, callback)
    trainer.train()
    trainer.state.is_world_process_zero = False
    (tmp_path / "run.png").unlink()
    callback.on_train_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert len(exported) == 1 and not (tmp_path / "run.png").exists()


@pytest.mark.parametrize(("arguments", "error", "words"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_wrong_arguments_are_refused_at_once(arguments, error, words):
    with pytest.raises(error, match=words):
        NdLoraCallback(**arguments)


def test_plot_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install matplotlib"):
        NdLoraCallback(plot="run.png")
