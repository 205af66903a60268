"""Plain values from YAML files and ``key=value`` overrides, with limits on size, depth and aliases."""

from __future__ import annotations

import os
import re

import yaml

from rdmd_fast.errors import InputError, is_plain
from rdmd_fast.files import read_text

MOST_BYTES, MOST_VALUES, MOST_LEVELS = 1 << 19, 10_000, 32
"""Of a configuration: bytes of its file, values and levels once aliases are followed. The longest preset has 60."""


_SHORTER = "write a long list of shards as a pattern such as shards/{0000..0999}.tar"


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string; people who write configs mean a number."""

    merged = composed = 0

    def compose_node(self, parent, index):
        """Keys and values are counted as they are read: half a megabyte of them would take seconds."""
        self.composed += 1
        if self.composed > 2 * MOST_VALUES:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"too many values: {_SHORTER}", mark)
        return super().compose_node(parent, index)

    def flatten_mapping(self, node) -> None:
        """Merge keys (<<), which can double a mapping again and again, are counted."""
        super().flatten_mapping(node)
        self.merged += len(node.value)
        if self.merged > MOST_VALUES:
            raise yaml.constructor.ConstructorError(None, None, "too many values", node.start_mark)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*(\.\d*)?|\.\d+)([eE][-+]?\d+)$|^[-+]?\d[\d_]*\.\d*$|^[-+]?\.\d+$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


# What PyYAML raises for values that do not fit their tags, beside its own errors.
_NOT_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


def _check_plain(values: dict, where: str) -> None:
    """Refuse what no configuration is, ahead of checks that would take for ever: aliases can make 10^9 values of ten.

    Raises:
        InputError: too many values, too deeply nested, a key that is no name, control characters.
    """
    count, level = 0, [("", values)]
    for _ in range(MOST_LEVELS):
        below = []
        for key, value in level:
            if isinstance(value, dict):
                below += [(f"{key}.{name}" if key else name, each) for name, each in value.items()]
                strange = next((name for name in value if not isinstance(name, str) or not is_plain(name)), None)
                if strange is not None or None in value:
                    raise InputError(f"{where}: {key or 'top'}: key {str(strange)[:60]!r} is no name")
            elif isinstance(value, list):
                below += [(key, each) for each in value]
            elif isinstance(value, str) and not is_plain(value, besides="\n\t"):  # as in commands of several lines
                raise InputError(f"{where}: {key}: holds control characters ({value[:60]!r})")
            elif isinstance(value, int | float) and not abs(value) < 2**64:
                raise InputError(f"{where}: {key}: is {_brief(value)}, must be a finite number of a size that is meant")
            elif not isinstance(value, str | int | float | None):
                raise InputError(f"{where}: {key}: is a {type(value).__name__}, write a number, a text or a list")
            count += 1
            if count + len(below) > MOST_VALUES:
                raise InputError(f"{where}: more than {MOST_VALUES} values: remove aliases, {_SHORTER}")
        level = below
        if not level:
            return
    raise InputError(f"{where}: {level[0][0][:60]}: nested deeper than {MOST_LEVELS} levels")


def read_values(path: str, overrides: list[str] = (), what: str = "config") -> dict:
    """Plain values of a YAML file (``what`` it is called in errors) with ``key=value`` overrides; errors as above."""
    try:
        text = read_text(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        remedy = f"; {_SHORTER}" if os.path.isfile(path) and os.path.getsize(path) > MOST_BYTES else ""
        raise InputError(f"{what} {path}: cannot be read ({_reason(error)}){remedy}") from None
    values = _parse_yaml(text, f"{what} {path}")
    if not isinstance(values, dict):
        raise InputError(f"{what} {path}: must be a mapping of keys to values, found {type(values).__name__}")
    for override in overrides:
        apply_override(values, override)
    _check_plain(values, f"{what} {path}")
    return values


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def _parse_yaml(text: str, where: str):
    try:
        return yaml.load(text, _Loader)
    except _NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise InputError(f"{where}: not valid YAML{line} ({problem})") from None


def apply_override(values: dict, override: str) -> None:
    """Put ``key=value`` (dotted key, YAML value) into nested ``values``; InputError for what is none."""
    key, separator, value = override.partition("=")
    if not separator or not all(part for part in key.split(".")):
        raise InputError(f"override {override!r}: write it as key=value, for example train.steps=1000")
    *parents, leaf = key.split(".")
    if len(parents) >= MOST_LEVELS:
        raise InputError(f"override {override!r}: no key has so many parts")
    section = values
    for depth, part in enumerate(parents):
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise InputError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    section[leaf] = _parse_yaml(value, f"override {override!r}")


def _brief(value) -> str:
    try:
        text = repr(value)
    except ValueError:  # a number of thousands of digits
        return "a huge number"
    return text if len(text) <= 100 else f"{text[:60]} … {text[-30:]}"
