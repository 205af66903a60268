"""The base of every typed option. Each component defines its own options beside its code; config.py composes them."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, field_validator

LARGEST, SMALLEST = 1e12, 1e-30
"""No option means a number beyond these; squares and products of what lies between them stay finite."""


class Options(BaseModel):
    """Immutable, strictly typed options: an unknown key, a value of another type, NaN or infinity is an error.

    So is a number that nobody means (``LARGEST``, ``SMALLEST``), but for those named in ``any_size``.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)
    any_size: ClassVar[frozenset[str]] = frozenset()

    @field_validator("*", mode="after")
    @classmethod
    def _of_a_size(cls, value, info):
        if info.field_name not in cls.any_size:
            for number in value if isinstance(value, list | tuple) else (value,):
                if isinstance(number, int | float) and number and not SMALLEST <= abs(number) <= LARGEST:
                    raise ValueError(f"must be 0 or from {SMALLEST:g} to {LARGEST:g} in size")
        return value
