"""The Dockerfiles pass hadolint and fit the manifests; each check fails on a broken copy."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy.images import DOCKERFILES, REPOSITORY, hadolint, image_problems
from tests.deploy.manifests import all_documents, containers, templates

CPU = next(path for path in DOCKERFILES if path.name == "cpu.Dockerfile")

HADOLINT = {
    "DL3002": (r"USER .*", "USER root"),
    "DL3007": (r"FROM \$\{BASE_IMAGE\}$", "FROM debian:latest"),
    "DL3008": (r"# hadolint ignore=DL3008", "#"),
    "DL3009": (r"&& rm -rf /var/lib/apt/lists/\*", "&& true"),
    "DL3015": (r" --no-install-recommends", ""),
    "DL3042": (r" --no-cache-dir", ""),
    "DL3025": (r"CMD .*", "CMD tip-ray --help"),
    "unexpected 'C'": (r"^COPY pyproject", "COPPY pyproject"),
}
BROKEN = {
    "USER": (r"USER .*", "USER tip-ray"),
    "one stage": (r"FROM \$\{BASE_IMAGE\} AS build\n", ""),
    "expected ${BASE_IMAGE}": (r"FROM \$\{BASE_IMAGE\}$", "FROM ubuntu:24.04"),
    "of one day": (r"bookworm-\d+-slim", "bookworm-slim"),
    "COPY tip_rays": (r"COPY tip_ray tip_ray", "COPY tip_rays tip_ray"),
    "COPY tests": (r"COPY tip_ray tip_ray", "COPY tests tip_ray"),
    "not extras": (r"\.\[cpu,", ".[cpus,"),
    "--constraint": (r" --constraint constraints.txt", ""),
    "image.version": (r'image.version="0', 'image.version="9'),
    "not installed: ['wget']": (r" wget ", " "),
    "job_specs": (r"COPY job_specs .*", "COPY job_specs /opt/job_specs"),
    "HOME": (r"HOME=/tmp", "HOME=/home"),
}


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_passes_hadolint_and_fits_the_manifests(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert hadolint(text) == ""
    assert image_problems(text) == []


@pytest.mark.parametrize(("code", "change"), HADOLINT.items(), ids=str)
def test_hadolint_sees(code: str, change: tuple[str, str]) -> None:
    assert code in hadolint(broken(change))


@pytest.mark.parametrize(("problem", "change"), BROKEN.items(), ids=str)
def test_a_broken_dockerfile_is_seen(problem: str, change: tuple[str, str]) -> None:
    assert problem in " ".join(image_problems(broken(change)))


def broken(change: tuple[str, str]) -> str:
    """The CPU image's file with one thing changed, wherever it stands."""
    text, times = re.subn(*change, CPU.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert times
    return text


def test_every_image_of_the_manifests_has_a_dockerfile() -> None:
    asked = {
        container["image"]
        for _, document in all_documents()
        for _, template in templates(document)
        for container in containers(template)
    }
    made = {
        tag
        for path in DOCKERFILES
        for tag in re.findall(
            r"docker build -f \S+ -t (\S+) .*\.", path.read_text(encoding="utf-8")
        )
    }
    assert asked == {f"registry.example/{tag}" for tag in made}


def test_the_gpu_image_installs_what_was_tested_but_for_cuda() -> None:
    cpu, gpu = pins("constraints.txt"), pins("constraints-gpu.txt")
    apart = {name for name in cpu.keys() & gpu.keys() if cpu[name] != gpu[name]}
    assert apart == {"apache-tvm-ffi", "triton"}  # pinned by vllm and by torch for CUDA
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (project["optional-dependencies"][extra] for extra in ("gpu", "math", "s3"))
    for requirement in map(Requirement, (*project["dependencies"], *chain(*extras))):
        assert requirement.specifier.contains(gpu[canonicalize_name(requirement.name)]), requirement


def pins(name: str) -> dict[str, str]:
    """Versions by package; each is named once."""
    lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    found = {canonicalize_name(package): version for package, version in pairs}
    assert len(found) == len(pairs)
    return dict(found)
