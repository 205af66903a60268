"""The pinned packages that `make install` installs: all of them, each with hashes, and nothing else is needed."""

import ast
import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
USED = ("eval", "toy", "text", "onnx", "test")  # of setup.py's extras
PIN = re.compile(r"(\S+)==([^\s;*]+)(?:; [^\\]+?)?((?: +--hash=sha256:[0-9a-f]{64})+)")


def pins(file: str) -> dict[str, str]:
    """Versions by name."""
    lines = (ROOT / file).read_text().replace("\\\n", "").splitlines()
    found = [PIN.fullmatch(line) or line for line in lines if not line.startswith(("#", "-r ", "-c "))]
    assert not [line for line in found if isinstance(line, str)], "no version with ==, or no hash"
    return {canonicalize_name(match[1]): match[2] for match in found}


TOOLS, DIRECT, OTHERS = map(pins, ("requirements-pip.txt", "requirements.txt", "constraints.txt"))


def wanted() -> list[Requirement]:
    """What setup.py names."""
    assigned = [node for node in ast.parse((ROOT / "setup.py").read_text()).body if isinstance(node, ast.Assign)]
    values = {node.targets[0].id: node.value for node in assigned}
    required, extras = ast.literal_eval(values["REQUIRED"]), ast.literal_eval(values["EXTRAS"])
    return [Requirement(text) for text in [*required, *(text for extra in USED for text in extras[extra])]]


def test_pinned_are_what_setup_py_names_in_versions_that_it_takes():
    versions = {canonicalize_name(each.name): each for each in wanted()}
    assert versions.keys() - TOOLS.keys() == DIRECT.keys()
    assert not DIRECT.keys() & OTHERS.keys()
    assert all(each.specifier.contains((TOOLS | DIRECT)[name]) for name, each in versions.items())


def test_what_the_installed_packages_depend_on_is_pinned():
    """As far as this machine's markers tell; CUDA's packages are named by another build of torch."""
    pinned, left, seen = TOOLS | DIRECT | OTHERS, [(name, "") for name in DIRECT], set()
    while left:
        name, extra = left.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            needed = map(Requirement, requires(name) or ())
        except PackageNotFoundError:  # on this machine, by a marker
            continue
        for each in needed:
            if each.marker is None or each.marker.evaluate({"extra": extra}):
                left += [(canonicalize_name(each.name), extra) for extra in ("", *each.extras)]
    assert {name for name, _ in seen} <= pinned.keys()
    assert {name for name in OTHERS if not name.startswith(("nvidia-", "cuda-"))} <= {name for name, _ in seen}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_make_install_needs_nothing_but_the_pinned():
    with tempfile.TemporaryDirectory() as folder:
        command = ["make", "-C", str(ROOT), "install", f"VENV={folder}/venv", f"PYTHON={sys.executable}"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        pip = [f"{folder}/venv/bin/python", "-m", "pip"]
        subprocess.run([*pip, "check"], check=True)
        listed = json.loads(subprocess.check_output([*pip, "list", "--format=json"]))
    installed = {canonicalize_name(each["name"]): each["version"].partition("+")[0] for each in listed}
    assert installed.pop("rdmd-fast")
    assert installed.items() <= (TOOLS | DIRECT | OTHERS).items() and DIRECT.keys() <= installed.keys()
