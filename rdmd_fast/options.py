"""The base of every typed option. Each component defines its own options beside its code; config.py composes them."""

import difflib
import typing
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic.fields import FieldInfo

from rdmd_fast.errors import InputError, quoted

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

    @classmethod
    def parse(cls, values: object, where: str, unknown: str | None = None, remedy: str = "") -> Self:
        """Read plain ``values``.

        Raises:
            InputError: ``where``, then what ``explain`` says (``unknown`` is handed on), then ``remedy``.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InputError(f"{where}: {explain(error, cls, unknown)}{remedy}") from None


def explain(
    error: ValidationError, model: type[BaseModel] | None = None, unknown: str | None = None, prefix: str = ""
) -> str:
    """Say in one line which key is wrong, and how.

    Args:
        model: what was validated, whose keys are known: the nearest is named in place of an unknown one.
        unknown: what to say of an unknown key instead; ``{}`` stands for it.
        prefix: goes before each key.
    """
    first = max(error.errors(), key=lambda each: len(each["loc"]))  # of a union, what got furthest
    is_unknown, given = first["type"] == "extra_forbidden", first["input"]
    key = _dotted(first["loc"], model, is_unknown)
    if is_unknown:
        return unknown.format(key) if unknown else f"unknown key {prefix}{key}{_nearest(key, model, prefix)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        message = "missing"
    elif message == first["msg"]:  # pydantic's own words, not a validator's
        message = message[0].lower() + message[1:]
    # A pickle's lists can hold one another, more values than could ever be written out.
    if _is_scalar(given) or (isinstance(given, list | tuple) and all(map(_is_scalar, given))):
        message += f", found {quoted(given)}"
    return f"{prefix}{key}: {message}" if key else message


def _is_scalar(value: object) -> bool:
    return isinstance(value, str | int | float | None)


def _dotted(location: tuple[str | int, ...], model: type[BaseModel] | None, is_unknown: bool) -> str:
    """Join a location without the names of unions' members, which pydantic puts among the keys."""
    if model is None:
        return ".".join(map(str, location))
    sections, parts = [model], []
    for depth, part in enumerate(location, 1):
        fields = fields_called(part, sections)
        if fields:
            sections = [each for field in fields for each in sections_of(field.annotation)]
        if fields or isinstance(part, int) or (is_unknown and depth == len(location)):
            parts.append(str(part))
    return ".".join(parts)


def _nearest(key: str, model: type[BaseModel] | None, prefix: str) -> str:
    options = [each for each, _, _ in options_of(model)] if model else []
    if key in options:
        return " for this kind"  # another member of the union has it
    known = list({part: None for each in options for part in accumulate(each.split("."), "{}.{}".format)})
    leaf = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=1)
    near += difflib.get_close_matches(key, [each for each in known if each.rsplit(".", 1)[-1] == leaf], n=1, cutoff=0)
    return f", did you mean {prefix}{near[0]}?" if near else ""


def options_of(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """List (dotted key, default, description) of every option of a section; ``prefix`` goes before each key."""
    seen = set()
    for name, field in model.model_fields.items():
        sections = list(sections_of(field.annotation))
        default = "" if field.is_required() else repr(field.get_default(call_default_factory=True))
        if not sections or field.description:
            plain = not sections or isinstance(field.default, int | float)
            yield f"{prefix}{field.alias or name}", default if plain else "", field.description or ""
        for section in sections:
            for key, value, description in options_of(section, f"{prefix}{field.alias or name}."):
                if key not in seen:
                    seen.add(key)
                    yield key, value, description


def sections_of(annotation: object) -> Iterator[type[BaseModel]]:
    """List the models that a field's annotation names, those of unions and lists too."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from sections_of(part)


def fields_called(name: str | int, sections: Iterable[type[BaseModel]]) -> list[FieldInfo]:
    """List the fields that the sections have under this name or alias."""
    fields = [(each, field) for section in sections for each, field in section.model_fields.items()]
    return [field for each, field in fields if name in (each, field.alias)]


def plain_types(annotation: object) -> Iterator[type]:
    """List the types of the numbers, texts and Nones that a field takes, alone or in lists."""
    if typing.get_origin(annotation) is Literal:
        yield from map(type, typing.get_args(annotation))
    elif isinstance(annotation, type) and not typing.get_args(annotation):
        if not issubclass(annotation, BaseModel):
            yield annotation
    else:
        for part in typing.get_args(annotation):
            yield from plain_types(part)
