"""The law of the house: a room imports only from rooms above it, and nothing heavy too early."""

from __future__ import annotations

import ast
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tip_ray"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A room may import from itself and from rooms of a lower number.
ROOMS = {
    "contract": 0,
    "demo": 1,
    "compute": 1,
    "runtime": 2,
    "stages": 3,
    "control": 4,
    "service": 5,
    "commands": 6,
    "cli": 7,
}
# What a room may import from outside the standard library; rooms that are absent are free.
CONTRACT = {"numpy", "pyarrow", "pydantic"}
OUTSIDE = {
    "contract": CONTRACT,
    "compute": CONTRACT | {"torch"},
    "runtime": CONTRACT | {"torch", "ray"},
    "cli": set(),
}
HEAVY = {"torch", "ray", "vllm", "transformers"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a module imports anywhere in it, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the room"
            module = node.module or ""
            yield module
            if module == "tip_ray":
                yield from (f"tip_ray.{alias.name}" for alias in node.names)


def test_every_module_is_in_a_room() -> None:
    assert {room_of(path) for path in MODULES} - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_above_it(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "tip_ray" and len(parts) > 1 and parts[1] in ROOMS:
            other = parts[1]
            assert other == room or ROOMS[other] < ROOMS[room], f"{room} imports {name}"
        elif parts[0] != "tip_ray" and parts[0] not in sys.stdlib_module_names and room in OUTSIDE:
            assert parts[0] in OUTSIDE[room], f"{room} imports {name}"


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`; fails if that took a second of CPU."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    script = f"{code}\nimport json, sys\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    return {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


@pytest.mark.parametrize(
    "code",
    [
        "import tip_ray",
        "import tip_ray; dir(tip_ray)",
        "from tip_ray.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from tip_ray.cli import main\ntry: main(['run', '--help'])\nexcept SystemExit: pass",
    ],
)
def test_nothing_heavy_is_loaded_to_begin_with(code: str) -> None:
    loaded = loaded_after(code)
    assert "tip_ray" in loaded
    assert not loaded & (HEAVY | {"pyarrow", "pydantic", "fsspec", "numpy"})


def test_specs_and_run_directories_need_nothing_heavy() -> None:
    code = "import tip_ray.control.run_reader, tip_ray; tip_ray.load_spec"
    assert not loaded_after(code) & HEAVY
