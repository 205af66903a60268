"""docs/troubleshooting.md quotes messages: each must be one that this code, or DeepSpeed's launcher, has."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/troubleshooting.md"
SOURCES = {
    "message": (ROOT / "rdmd_fast", ROOT / "kernels"),
    "message of the deepspeed launcher": (Path(importlib.util.find_spec("deepspeed").origin).parent / "launcher",),
}


def quotes(header):
    """What stands in backticks in the first column of the page's tables of that header."""
    found, ours = [], False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().split("|")[1:-1]]
        if not cells:
            ours = False
        elif cells[0] == header:
            ours = True
        elif ours:
            found += re.findall(r"`([^`]+)`", cells[0])
    return found


def texts(folders):
    """Every string of the code, with … for what is put into it."""
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            inside = set()
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    inside.update(id(part) for part in node.values)
                    yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
                    yield node.value


def is_said(quote, said):
    pattern = ".*".join(re.escape(part) for part in quote.split("…"))
    return any(re.search(pattern, text, re.DOTALL) for text in said)


@pytest.mark.parametrize("header", SOURCES)
def test_quoted_messages_are_in_the_code(header):
    said = list(texts(SOURCES[header]))
    listed = quotes(header)
    assert len(listed) > 3
    assert [quote for quote in listed if not is_said(quote, said)] == []


def test_a_message_that_nobody_prints_is_found_out():
    said = ["run_dir …: another job is training in it, choose another", "error: …"]
    assert is_said("run_dir …: another job is training in it", said)
    assert not is_said("run_dir …: another job trains in it", said)
    assert not is_said("another job …: run_dir", said)
