"""Command lines of the manifests and of deploy/README.md, read as `tip-ray` reads them."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from tests.deploy.manifests import DEPLOY, MOUNTED_SPECS, REPOSITORY, Document, built
from tip_ray.cli import _parser
from tip_ray.contract.spec import RunSpec
from tip_ray.control.spec_file import load_spec, parse_assignments


def entrypoint(job: Document) -> argparse.Namespace:
    """A RayJob's entrypoint as options, its spec still where the pod sees it."""
    return options_of(job["spec"]["entrypoint"])


def submitted() -> list[argparse.Namespace]:
    """Every `tip-ray submit` of the README."""
    text = (DEPLOY / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    return [options_of(line) for line in re.findall(r"^tip-ray submit .*$", text, re.MULTILINE)]


def options_of(line: str) -> argparse.Namespace:
    """A `tip-ray` command line, parsed."""
    program, *arguments = shlex.split(line)
    assert program == "tip-ray"
    return _parser().parse_args(arguments)


def mounted_spec(options: argparse.Namespace, folder: Path) -> Path:
    """The spec that an entrypoint names, out of the ConfigMap that is mounted there."""
    assert options.spec.startswith(MOUNTED_SPECS), options.spec
    (specs,) = (one for one in built("base") if one["metadata"]["name"] == "tip-ray-job-specs")
    path = folder / options.spec.removeprefix(MOUNTED_SPECS)
    path.write_text(specs["data"][path.name], encoding="utf-8")
    return path


def spec_of(options: argparse.Namespace, folder: Path) -> RunSpec:
    """The spec that a command line runs, with what it sets."""
    path = REPOSITORY / options.spec
    if options.command == "run":
        path = mounted_spec(options, folder)
    return load_spec(str(path), parse_assignments(options.assignments))
