"""Plain values from YAML files and ``key=value`` overrides, with limits on size, depth and aliases.

A value is read as its key wants it: of an option that is a text, what is written is kept, as 010, 1e3, yes or
2026-01-31, and behind ``key=`` all of it, ``#`` and brackets too. Only null (and nothing) is None there, and quotes are
YAML's. Numbers are decimal, with leading zeros too, unless they begin with 0x or 0b.
"""

import os
import re
import typing

import yaml
from pydantic import BaseModel

from rdmd_fast.errors import InputError, is_plain, quoted
from rdmd_fast.files import read_text
from rdmd_fast.options import fields_called, plain_types, sections_of

MOST_BYTES, MOST_VALUES, MOST_LEVELS = 1 << 19, 10_000, 32
"""Of a configuration: bytes of its file, values and levels once aliases are followed. The longest preset has 60."""


_SHORTER = "write a long list of shards as a pattern such as shards/{0000..0999}.tar"


_INT, _FLOAT, _NULL, _TEXT, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "null", "str", "merge"))


class _Loader(yaml.SafeLoader):
    """Counts values while it reads: half a megabyte of them would take seconds, aliases make 10^9 of ten.

    YAML 1.1 reads 1e-4 as a text, 010 as 8 and 12:30 as 750; people who write configs mean none of these.
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

    def compose_mapping_node(self, anchor):
        """Refuse a key that stands twice; one beside the same of a merged mapping (<<) overrides that."""
        node, lines = super().compose_mapping_node(anchor), {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in lines:
                problem = f"{key.value[:60]} stands at line {lines[key.value]} already, keep one of them"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return node

    def read(self, kinds: list):
        """The document as plain values, for options of the annotations ``kinds`` (none: unknown)."""
        node = self.get_single_node()
        if node is None:
            return None
        self._keep_texts(node, kinds)
        return self.construct_document(node)

    def _keep_texts(self, node: yaml.Node, kinds: list) -> None:
        """Undo YAML's reading of what stands unquoted where a text belongs."""
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                self._keep_texts(value, kinds if key.tag == _MERGE else _kinds_below(kinds, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for each in node.value:
                self._keep_texts(each, kinds)
        elif node.style is None and node.tag != _NULL and _is_text(kinds):
            is_untagged = node.tag == self.resolve(yaml.ScalarNode, node.value, (True, False))
            node.tag = _TEXT if is_untagged else node.tag

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node).replace("_", "")
        return int(text, 0) if re.match("[-+]?0[bx]", text) else int(text)


_NUMBERS = {
    _INT: re.compile(r"[-+]?(0b[01_]+|0x[\da-fA-F_]+|\d[\d_]*)$"),
    _FLOAT: re.compile(
        r"^[-+]?(\d[\d_]*(\.\d*)?|\.\d+)([eE][-+]?\d+)$|^[-+]?\d[\d_]*\.\d*$|^[-+]?\.\d+$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor(_INT, _Loader.construct_int)


class _Dumper(yaml.SafeDumper):
    """Quotes texts that any reader would take for something else, this one included."""


for _tag, _pattern in _NUMBERS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, _pattern, list("-+0123456789."))


def dump_values(values: dict) -> str:
    """Plain values as YAML, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _kinds_below(kinds: list, name: object) -> list:
    """Annotations of the options called ``name`` in the sections that ``kinds`` name."""
    return [field.annotation for field in fields_called(name, [each for kind in kinds for each in sections_of(kind)])]


def _is_text(kinds: list) -> bool:
    """Whether an option takes texts, and neither numbers nor true and false."""
    types = [each for kind in kinds for each in plain_types(kind)]
    return str in types and not any(each in types for each in (bool, int, float))


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


def read_values(
    path: str, overrides: list[str] = (), what: str = "config", model: type[BaseModel] | None = None
) -> dict:
    """Plain values of a YAML file (``what`` it is called in errors) with ``key=value`` overrides; errors as above.

    Args:
        overrides: of two of the same key the last one counts, so that a script can add its own.
        model: the options that the values are for.
    """
    try:
        text = read_text(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        remedy = f"; {_SHORTER}" if os.path.isfile(path) and os.path.getsize(path) > MOST_BYTES else ""
        raise InputError(f"{what} {path}: cannot be read ({_reason(error)}){remedy}") from None
    values = _parse_yaml(text, f"{what} {path}", [model])
    if not isinstance(values, dict):
        raise InputError(f"{what} {path}: must be a mapping of keys to values, found {type(values).__name__}")
    for override in overrides:
        apply_override(values, override, model)
    _check_plain(values, f"{what} {path}")
    return values


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split())


def _parse_yaml(text: str, where: str, kinds: list):
    try:
        return _Loader(text).read(kinds)
    except _NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or type(error).__name__
        raise InputError(f"{where}: not valid YAML{line} ({problem})") from None


def apply_override(values: dict, override: str, model: type[BaseModel] | None = None) -> None:
    """Put ``key=value`` (dotted key of ``model``) into nested ``values``; InputError for what is none."""
    key, separator, text = override.partition("=")
    if not separator or not all(part for part in key.split(".")):
        raise InputError(f"override {override!r}: write it as key=value, for example train.steps=1000")
    *parents, leaf = key.split(".")
    if len(parents) >= MOST_LEVELS:
        raise InputError(f"override {override!r}: no key has so many parts")
    section, kinds = values, [model]
    for depth, part in enumerate(parents):
        if section.get(part) is None:
            section[part] = {}
        section, kinds = section[part], _kinds_below(kinds, part)
        if not isinstance(section, dict):
            raise InputError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is a value, not a section")
    kinds = _kinds_below(kinds, leaf)
    section[leaf] = text.strip() if _stands_as_text(text, kinds) else _parse_yaml(text, f"override {override!r}", kinds)


def _stands_as_text(text: str, kinds: list) -> bool:
    """Whether the value of an override is no YAML but a text as it stands."""
    text = text.strip()
    is_null, is_quoted = text in ("", "~", "null", "Null", "NULL"), text[:1] in ("'", '"') and text[:1] == text[-1:]
    is_nested = text[:1] + text[-1:] in ("[]", "{}") and any(map(_is_nested, kinds))
    return _is_text(kinds) and not (is_null or is_quoted or is_nested)


def _is_nested(kind: object) -> bool:
    """Whether an annotation takes lists or sections, too."""
    is_section = isinstance(kind, type) and issubclass(kind, BaseModel)
    return is_section or typing.get_origin(kind) in (list, tuple) or any(map(_is_nested, typing.get_args(kind)))
