"""The manifests as a cluster would be sent them, and the pods in them."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
DEPLOY = REPOSITORY / "deploy"
MOUNTED_SPECS = "/opt/tip-ray/job_specs/"

Document = dict[str, Any]


def kustomizations() -> list[str]:
    """Every kustomization that stands alone, by its folder below deploy/."""
    found = [
        path.parent.relative_to(DEPLOY).as_posix()
        for path in DEPLOY.rglob("kustomization.yaml")
        if yaml.safe_load(path.read_text(encoding="utf-8"))["kind"] == "Kustomization"
    ]
    return sorted(found)


@functools.cache
def built(folder: str) -> tuple[Document, ...]:
    """What `kubectl kustomize deploy/FOLDER` prints; no server is asked."""
    return tuple(yaml.safe_load_all(kustomized(DEPLOY / folder)))


def kustomized(folder: Path) -> str:
    """The output of kubectl; its own error if it refuses."""
    kubectl = Path(sys.executable).parent / "kubectl"
    environment = {**os.environ, "KUBECONFIG": os.devnull}
    done = subprocess.run(
        [kubectl, "kustomize", str(folder)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def all_documents() -> list[tuple[str, Document]]:
    """(`folder: Kind name`, document) of every kustomization."""
    return [
        (f"{folder}: {one['kind']} {one['metadata']['name']}", one)
        for folder in kustomizations()
        for one in built(folder)
    ]


def ray_cluster(document: Document) -> Document | None:
    """The RayClusterSpec of a RayCluster or a RayJob."""
    if document["kind"] == "RayJob":
        return document["spec"].get("rayClusterSpec")
    return document["spec"] if document["kind"] == "RayCluster" else None


def templates(document: Document) -> Iterator[tuple[str, Document]]:
    """(what it is for, pod template) of every pod that a document brings about."""
    if document["kind"] == "Deployment":
        yield "pod", document["spec"]["template"]
    if document["kind"] == "RayJob" and "submitterPodTemplate" in document["spec"]:
        yield "submitter", document["spec"]["submitterPodTemplate"]
    if cluster := ray_cluster(document):
        yield "head", cluster["headGroupSpec"]["template"]
        for group in cluster.get("workerGroupSpecs", []):
            yield group["groupName"], group["template"]


def containers(template: Document) -> list[Document]:
    """All of a pod's containers, the init containers too."""
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]
