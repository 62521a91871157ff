"""Which kernels the environment asks for. `NDLORA_TRITON=1` switches Triton's on; they were never timed."""

import os

from ndlora_plugins.errors import MissingExtraError
from ndlora_plugins.kernels import modes

__all__ = ["switch_on"]


def switch_on() -> None:
    """Let Kronecker sums take the kernels that the environment asks for.

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
    if triton_mode_product not in modes.others:
        modes.others.append(triton_mode_product)
