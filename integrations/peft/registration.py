"""Makes NDLORA one of PEFT's tuner types. Runs when `peft.tuners` has been imported; see ndlora_autoload.py.

`PeftType` is a closed enum and `register_peft_method` takes only its members, so a member is added to it first.
"""

import warnings

from .names import METHOD_NAME, NAME, PREFIX, extend_enum

__all__ = ["activate"]


def activate() -> None:
    """Register. Idempotent; never raises: a PEFT that we do not fit gets a stub that says so when it is used."""
    try:
        _register()
    except Exception as error:
        warnings.warn(
            f"ndlora-plugins does not fit this version of PEFT ({type(error).__name__}: {error}). PEFT works as "
            f"ever; NDLORA adapters cannot be used until ndlora-plugins is upgraded.",
            RuntimeWarning,
            stacklevel=2,
        )
        _register_stub(error)


def _register() -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType, register_peft_method

    existing = PEFT_TYPE_TO_CONFIG_MAPPING.get(NAME)  # pyright: ignore[reportArgumentType]  a member of the enum
    if existing is not None:
        module = getattr(existing, "__module__", "")
        if not module.startswith("ndlora_plugins."):
            warnings.warn(
                f"PEFT has its own {NAME} ({module}.{existing.__name__}): it is left as it is. Uninstall "
                f"ndlora-plugins, or use its classes by hand under another name.",
                RuntimeWarning,
                stacklevel=3,
            )
        return
    from .configuration.config import NdLoraConfig
    from .tuner.model import NdLoraModel

    extend_enum(PeftType, NAME, NAME)
    register_peft_method(name=METHOD_NAME, config_cls=NdLoraConfig, model_cls=NdLoraModel, prefix=PREFIX)


def _register_stub(error: Exception) -> None:
    """Put something into PEFT's table whose use explains itself, instead of a bare KeyError: 'NDLORA'."""
    reason = f"{type(error).__name__}: {error}"

    class UnavailableConfig:
        def __init__(self, *args, **kwargs):
            raise ImportError(
                f"This adapter is of type {NAME}, of the package ndlora-plugins, whose installed version does not "
                f"fit the installed PEFT ({reason}). Upgrade ndlora-plugins."
            )

        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            return cls()

    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(NAME, UnavailableConfig)  # pyright: ignore[reportArgumentType]  a stub
    except Exception:  # not even the table is where it was: the warning above has to do
        pass
