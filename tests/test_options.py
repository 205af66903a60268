"""What a wrong option is called in one line."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError

from rdmd_fast.errors import InputError
from rdmd_fast.options import Options, explain


class Round(Options):
    kind: Literal["round"]
    radius: float = Field(1.0, gt=0)


class Square(Options):
    kind: Literal["square"]
    side: float | list[float] = 1.0


class Drawing(Options):
    shape: Annotated[Round | Square, Field(discriminator="kind")]
    others: list[Annotated[Round | Square, Field(discriminator="kind")]] = Field(default_factory=list)
    source: str | Round | None = None


ROUND, SQUARE = {"kind": "round"}, {"kind": "square"}


@pytest.mark.parametrize(("values", "line"), [
    ({}, "shape: missing"),
    ({"shape": {**ROUND, "radius": -1}}, "shape.radius: input should be greater than 0, found -1"),
    ({"shape": {**ROUND, "raduis": 1}}, "unknown key shape.raduis, did you mean shape.radius?"),
    ({"shape": {**ROUND, "side": 1}}, "unknown key shape.side for this kind"),
    ({"shape": {**ROUND, "round": 1}}, "unknown key shape.round, did you mean"),
    ({"shape": ROUND, "others": [ROUND, {**SQUARE, "side": "x"}]}, "others.1.side: input should be a valid number"),
    ({"shape": ROUND, "radius": 1}, "unknown key radius, did you mean shape.radius?"),
    ({"shape": {**SQUARE, "side": [1, 1e13]}}, "shape.side: must be 0 or from 1e-30 to 1e+12 in size, found [1, "),
    ({"shape": ROUND, "source": {"kind": "rund"}}, "source.kind: input should be 'round', found 'rund'"),
    (3, "input should be a valid dictionary or instance of Drawing, found 3"),
])  # fmt: skip
def test_a_wrong_key_is_named_without_the_kinds_of_unions(values, line):
    with pytest.raises(InputError) as caught:
        Drawing.parse(values, "drawing", remedy=", draw again")
    assert str(caught.value).startswith(f"drawing: {line}") and str(caught.value).endswith(", draw again")


def test_lists_that_hold_one_another_are_not_written_out():
    bomb = ["x"]
    for _ in range(60):
        bomb = [bomb, bomb]
    with pytest.raises(ValidationError) as caught:
        Round(kind="round", radius=bomb)
    assert explain(caught.value) == "radius: input should be a valid number"
