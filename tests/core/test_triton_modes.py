"""The Triton kernels: they agree with the other form, compile for real GPUs, and are off."""

import os
import pathlib
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from ndlora_plugins.errors import MissingExtraError
from ndlora_plugins.kernels import switch
from ndlora_plugins.kernels.modes import plan_contraction

COMPARE = pathlib.Path(__file__).with_name("compare_triton_modes.py")

# in modes, out modes, dtypes that are taken
LAYERS = [
    ((32, 64), (32, 64), ("bf16", "fp16", "fp32")),  # Qwen3-1.7B, 2048 x 2048
    ((64, 64), (64, 64), ("bf16", "fp32")),  # Llama-3-8B, 4096 x 4096
    ((64, 64), (112, 128), ("bf16",)),  # 4096 -> 14336
    ((112, 128), (64, 64), ("bf16",)),  # 14336 -> 4096
]
# compute capability -> bytes of shared memory that a program may have
SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def run_compare(**environment):
    """The tests of `compare_triton_modes.py` in a process of their own."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(COMPARE)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr


def test_in_the_interpreter():
    pytest.importorskip("triton")
    run_compare(TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="no NVIDIA GPU")
def test_on_the_gpu():
    run_compare(TRITON_INTERPRET="0")


def compiled(kernel, dtype, capability, constants):
    """The kernel compiled by Triton for a GPU that need not be there, for float32 factors."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    constants = dict(constants)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    types = {"first": "*fp32", "second": "*fp32", "first_sums": "*fp32", "second_sums": "*fp32"}
    types |= {"tokens": "i32", "scaling": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, f"*{dtype}") for name in kernel.arg_names}
    # as at a launch: torch's memory lies at multiples of 16 bytes
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize(
    "in_modes, out_modes, dtype", [(i, o, dtype) for i, o, dtypes in LAYERS for dtype in dtypes], ids=str
)
def test_compiles_for_gpus_and_fits_into_their_shared_memory(
    in_modes, out_modes, dtype, capability, tmp_path, monkeypatch
):
    pytest.importorskip("triton")
    from ndlora_plugins.kernels import triton_modes

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    monkeypatch.setattr(triton_modes, "_INTERPRETED", True)  # or only a GPU's tensor is taken
    product = triton_modes.triton_mode_product(in_modes, out_modes, 1)
    assert product._takes(torch.empty(1, product.in_features, dtype=DTYPES[dtype]))
    there, back = (product.constants(DTYPES[dtype], transposed) for transposed in (False, True))
    there_first = plan_contraction(in_modes, out_modes).order == (1, 0)
    back_first = plan_contraction(out_modes, in_modes).order == (1, 0)
    launches = [
        (triton_modes.add_product, there | dict(TRANSPOSED=False, SECOND_MODE_FIRST=there_first, ADD=True)),
        (triton_modes.add_product, back | dict(TRANSPOSED=True, SECOND_MODE_FIRST=back_first, ADD=True)),
        (triton_modes.factor_gradients, there | dict(FIRST=True, SECOND=True)),
    ]
    for kernel, constants in launches:
        binary = compiled(kernel, dtype, capability, constants)
        assert binary.asm["cubin"] and binary.metadata.shared <= SHARED_MEMORY[capability]


@pytest.mark.parametrize(
    "value, on",
    [
        ("", False),
        pytest.param("1", True, marks=pytest.mark.skipif(find_spec("triton") is None, reason="no triton")),
    ],
)
def test_off_and_not_imported_unless_the_environment_says_otherwise(value, on):
    code = (
        "import sys, ndlora_plugins.adapter, ndlora_plugins.builtin\n"
        "from ndlora_plugins.kernels import modes\n"
        f"assert len(modes.others) == {int(on)}\n"
        f"assert ('ndlora_plugins.kernels.triton_modes' in sys.modules) is {on}"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, env=os.environ | {"NDLORA_TRITON": value})


def test_without_triton_the_switch_says_what_to_do(monkeypatch):
    monkeypatch.setenv("NDLORA_TRITON", "1")
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "ndlora_plugins.kernels.triton_modes", raising=False)
    with pytest.raises(MissingExtraError, match="pip install triton.*unset NDLORA_TRITON"):
        switch.switch_on()
