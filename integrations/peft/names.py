"""What the tuner type is called, and the member of PEFT's enum that it needs."""

__all__ = ["METHOD_NAME", "NAME", "PREFIX", "extend_enum"]

NAME = "NDLORA"
METHOD_NAME = "ndlora"
# transformers derives `peft_type.value.lower() + "_"`, so it cannot be anything else
PREFIX = "ndlora_"


def extend_enum(enum_class, name: str, value: str):
    """Add a member to a `(str, Enum)` class and return it; a member of that name and value is returned as it is.

    Raises:
        ValueError: the name or the value is taken by something else.
    """
    existing = enum_class.__members__.get(name)
    if existing is not None and existing.value == value:
        return existing
    if existing is not None or value in enum_class._value2member_map_ or hasattr(enum_class, name):
        raise ValueError(f"{enum_class.__name__} already has a member {name!r} or a value {value!r}.")
    member = str.__new__(enum_class, value)
    member._name_ = name
    member._value_ = value
    member.__objclass__ = enum_class
    member._sort_order_ = len(enum_class._member_names_)
    type.__setattr__(enum_class, name, member)
    enum_class._member_names_.append(name)
    enum_class._member_map_[name] = member
    enum_class._value2member_map_[value] = member
    return member
