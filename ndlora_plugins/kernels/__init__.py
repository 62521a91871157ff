"""Kernels for single devices. `NDLORA_TRITON=1` in the environment switches Triton's on; they were never timed."""

import os

from ndlora_plugins.errors import MissingExtraError
from ndlora_plugins.structures import kronecker

__all__ = ["switch_on"]


def switch_on() -> None:
    """Let the structures take the kernels that the environment asks for.

    Raises:
        MissingExtraError: they need a package that cannot be imported.
    """
    if os.environ.get("NDLORA_TRITON") != "1":
        return
    try:
        from ndlora_plugins.kernels.triton_modes import triton_mode_product
    except ImportError as error:
        raise MissingExtraError(
            "NDLORA_TRITON=1 asks for the Triton kernels, but triton cannot be imported. torch's CUDA builds bring it; "
            "else `pip install triton`, or unset NDLORA_TRITON."
        ) from error
    if triton_mode_product not in kronecker.kernels:
        kronecker.kernels.append(triton_mode_product)
