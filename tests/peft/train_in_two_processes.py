"""Started by test_shared.py: a process alone and two together (DDP, gloo), with the same global batch. They are forks
of this one, which has done the imports.
"""

import importlib.util
import os
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ndlora_plugins import NdLoraConfig, register_plugin

STRANGERS = Path(__file__).parents[1] / "strangers"


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def train(method, rank, world):
    """The adapter after four steps of eight samples."""
    torch.manual_seed(0)
    model = get_peft_model(
        Layers(), NdLoraConfig(method=method, r=4, target_modules=r"layers\.\d", random_seed=1)
    )
    model.train()
    parallel = DistributedDataParallel(model) if world > 1 else model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(4):
        x = torch.randn(8, 8)[rank::world]
        (parallel(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {key: value.detach() for key, value in model.named_parameters() if "ndlora_" in key}


def main(output, rank, world):
    if world > 1:
        torch.distributed.init_process_group("gloo", f"file://{output}/store", rank=rank, world_size=world)
    for file in ("shared_sides", "dylora"):
        spec = importlib.util.spec_from_file_location(file, STRANGERS / f"{file}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        register_plugin(module, name=file)
        save_file(train(module.method.name, rank, world), f"{output}/{file}-{rank}-of-{world}.safetensors")
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    children = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        child = os.fork()
        if not child:
            main(sys.argv[1], rank, world)
            sys.exit()
        children.append(child)
    sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
