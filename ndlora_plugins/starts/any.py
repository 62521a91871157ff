"""Starts that fit every method."""

from ndlora_plugins.starts.base import Start, random_but_zero, random_values

__all__ = ["starts"]

starts = (
    Start(
        name="random",
        summary="every factor Kaiming-uniform and no anchor: for tests (init_lora_weights=False)",
        source="torch.nn.Linear",
        function=random_values,
        moves=True,
    ),
    Start(
        name="first_zero",
        summary="the first factor that trains zero, the others Kaiming-uniform: the model starts as it is",
        source="LoRA's rule (arXiv 2106.09685, section 4.1) for any multilinear form",
        function=random_but_zero(),
        zero=lambda names, trains: [name for name in names if name in trains][:1],
    ),
)
