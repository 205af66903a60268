"""The base of every typed option. Each component defines its own options beside its code; config.py composes them."""

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Immutable, strictly typed options: an unknown key or a value of another type is an error."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)
