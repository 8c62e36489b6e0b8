"""The Dockerfiles, what hadolint says of them, and what the manifests expect of an image."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.deploy.manifests import MOUNTED_SPECS, REPOSITORY

DOCKERFILES = sorted((REPOSITORY / "docker").glob("*.Dockerfile"))
USER = "1000:1000"  # as the manifests' runAsUser and runAsGroup
STARTERS = {"bash", "wget", "ca-certificates"}  # KubeRay's own commands, and storage over TLS

Instructions = list[tuple[str, str]]


def hadolint(text: str) -> str:
    """Its complaints, one a line; empty if there are none."""
    program = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [program, "--no-color", "-"], input=text, capture_output=True, text=True, timeout=60
    )
    assert not done.stderr, done.stderr
    assert bool(done.returncode) == bool(done.stdout)
    return done.stdout


def instructions(text: str) -> Instructions:
    """(keyword, value) by the order of the file, continued lines joined."""
    code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    lines = code.replace("\\\n", " ").splitlines()
    return [(key, value) for key, _, value in (line.partition(" ") for line in lines) if key]


def image_problems(text: str) -> list[str]:
    """What would keep an image from running in the manifests' pods, or from being made again."""
    found = instructions(text)
    last_stage = found[max(i for i, (key, _) in enumerate(found) if key == "FROM") :]
    return [
        *_base_problems(found),
        *_content_problems(found),
        *_run_problems(last_stage),
    ]


def _base_problems(found: Instructions) -> list[str]:
    stages = [value.split()[0] for key, value in found if key == "FROM"]
    base = next((value for key, value in found if key == "ARG"), "")
    problems = [] if len(stages) > 1 else ["one stage: what built it would stay in it"]
    if set(stages) != {"${BASE_IMAGE}"}:
        problems.append(f"FROM {stages}: expected ${{BASE_IMAGE}}")
    if not re.fullmatch(r"BASE_IMAGE=[a-z/.]+:[a-z]+-\d{8}(-slim)?(@sha256:[0-9a-f]{64})?", base):
        problems.append(f"ARG {base}: expected BASE_IMAGE=name:tag of one day")
    return problems


def _content_problems(found: Instructions) -> list[str]:
    copies = [value.split()[:-1] for key, value in found if key == "COPY" and "--from" not in value]
    let_in = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
    problems = [
        f"COPY {source}: not there, or not in .dockerignore as !{source}"
        for sources in copies
        for source in sources
        if not (REPOSITORY / source).exists() or f"!{source}" not in let_in
    ]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    steps = " ".join(value for key, value in found if key == "RUN")
    extras = re.findall(r"'\.\[([a-z0-9,]+)\]'", steps)
    if not extras or not set(extras[0].split(",")) <= set(project["optional-dependencies"]):
        problems.append(f"pip install .[{','.join(extras)}]: not extras of pyproject.toml")
    exact = "constraints-gpu.txt" if "gpu" in ",".join(extras).split(",") else "constraints.txt"
    if f"--constraint {exact}" not in steps:
        problems.append(f"pip install without --constraint {exact}")
    labels = " ".join(value for key, value in found if key == "LABEL")
    if f'image.version="{project["version"]}"' not in labels:
        problems.append(f"org.opencontainers.image.version: expected {project['version']}")
    return problems


def _run_problems(last_stage: Instructions) -> list[str]:
    values = {key: value for key, value in last_stage if key != "RUN"}
    steps = " ".join(value for key, value in last_stage if key == "RUN")
    problems = []
    if values.get("USER") != USER:
        problems.append(f"USER {values.get('USER')}: expected {USER}")
    if missing := STARTERS - set(re.findall(r"[a-z0-9-]+", steps)):
        problems.append(f"not installed: {sorted(missing)}")
    if ("COPY", f"job_specs {MOUNTED_SPECS.rstrip('/')}") not in last_stage:
        problems.append(f"job_specs: expected at {MOUNTED_SPECS}")
    if "HOME=/tmp" not in values.get("ENV", ""):
        problems.append("HOME: expected /tmp, which the pods mount")
    return problems
