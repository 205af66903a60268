"""Plain values from YAML files and ``key=value`` overrides, with limits on size, depth and aliases."""

import os
import re

import yaml

from rdmd_fast.errors import InputError, is_plain, quoted
from rdmd_fast.files import read_text

MOST_BYTES, MOST_VALUES, MOST_LEVELS = 1 << 19, 10_000, 32
"""Of a configuration: bytes of its file, values and levels once aliases are followed. The longest preset has 60."""


_SHORTER = "write a long list of shards as a pattern such as shards/{0000..0999}.tar"


class _Loader(yaml.SafeLoader):
    """Counts values while it reads: half a megabyte of them would take seconds, aliases make 10^9 of ten.

    YAML 1.1 reads 1e-4 as a string; people who write configs mean a number.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self._count, self._counts = 0, {}

    def compose_node(self, parent, index):
        """An alias, whether it stands for a value or is merged (<<), counts as all that it stands for."""
        before, is_alias = self._count, self.check_event(yaml.AliasEvent)
        mark = self.peek_event().start_mark
        if parent is None or index is not None:  # no key
            self._count += 1
        node = super().compose_node(parent, index)
        if is_alias and node not in self._counts:
            problem = f"nested deeper than {MOST_LEVELS} levels, an alias stands within what it names"
            raise yaml.composer.ComposerError(None, None, problem, mark)
        if is_alias:
            self._count = before + self._counts[node]
        self._counts[node] = self._count - before
        if self._count > MOST_VALUES:
            problem = f"too many values, more than {MOST_VALUES}: remove aliases, {_SHORTER}"
            raise yaml.composer.ComposerError(None, None, problem, mark)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d[\d_]*(\.\d*)?|\.\d+)([eE][-+]?\d+)$|^[-+]?\d[\d_]*\.\d*$|^[-+]?\.\d+$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


# What PyYAML raises for values that do not fit their tags, beside its own errors.
_NOT_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)


def _check_plain(value, where: str, key: str = "", level: int = 0) -> None:
    """Refuse what no configuration holds.

    Raises:
        InputError: too deeply nested, a key that is no name, control characters, a number or an object of no use.
    """
    if level == MOST_LEVELS:
        raise InputError(f"{where}: {key[:60]}: nested deeper than {MOST_LEVELS} levels")
    if isinstance(value, dict):
        for name, below in value.items():
            if not isinstance(name, str) or not is_plain(name):
                raise InputError(f"{where}: {key or 'top'}: key {str(name)[:60]!r} is no name")
            _check_plain(below, where, f"{key}.{name}" if key else name, level + 1)
    elif isinstance(value, list):
        for below in value:
            _check_plain(below, where, key, level + 1)
    elif isinstance(value, str) and not is_plain(value, besides="\n\t"):  # as in commands of several lines
        raise InputError(f"{where}: {key}: holds control characters ({value[:60]!r})")
    elif isinstance(value, int | float) and not abs(value) < 2**64:
        raise InputError(f"{where}: {key}: is {quoted(value)}, must be a finite number of a size that is meant")
    elif not isinstance(value, str | int | float | None):
        raise InputError(f"{where}: {key}: is a {type(value).__name__}, write a number, a text or a list")


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
