"""Closed JSON schemas of KubeRay's kinds, from its custom resource definitions."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from tests.deploy.manifests import Document

FOLDER = "KUBERAY_CRDS"
FILES = {"RayJob": "ray.io_rayjobs.yaml", "RayCluster": "ray.io_rayclusters.yaml"}


def schema_problems(document: Document) -> list[str]:
    """Fields that the API server would refuse, or, when it does not know them, silently drop."""
    errors = _validator(document["kind"]).iter_errors(document)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


@functools.cache
def _validator(kind: str) -> Any:
    path = Path(os.environ[FOLDER]) / FILES[kind]
    # safe_load with libyaml: the definitions are megabytes long.
    definition = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    (version,) = (one for one in definition["spec"]["versions"] if one["name"] == "v1")
    return jsonschema.Draft202012Validator(closed(version["schema"]["openAPIV3Schema"]))


def closed(node: Any) -> Any:
    """`node` with unknown fields refused, and fields with a default no longer required."""
    if isinstance(node, list):
        return [closed(one) for one in node]
    if not isinstance(node, dict):
        return node
    result = {name: closed(value) for name, value in node.items()}
    if result.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    fields = node.get("properties")
    if isinstance(fields, dict) and node.get("type") == "object":
        result.setdefault(
            "additionalProperties", node.get("x-kubernetes-preserve-unknown-fields", False)
        )
        required = [name for name in node.get("required", []) if "default" not in fields[name]]
        result["required"] = required
    return result
