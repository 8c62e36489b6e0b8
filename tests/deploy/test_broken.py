"""Every check of the manifests is seen to fail on a copy that is broken in one place."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.entrypoints import entrypoint, spec_of
from tests.deploy.manifests import DEPLOY, Document, built, kustomized, ray_cluster
from tests.deploy.references import pod_labels, reference_problems, selected
from tests.deploy.rooms import room_problems
from tests.deploy.rules import hardening_problems, kuberay_problems, pool_problems
from tests.deploy.schemas import FOLDER, closed, schema_problems

Break = Callable[..., Any]


@pytest.fixture
def job() -> Document:
    (document,) = (one for one in built("quickstart") if one["kind"] == "RayJob")
    return copy.deepcopy(document)


def group(job: Document, index: int) -> Document:
    found: Document = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][index]
    return found


def pod(job: Document, index: int) -> Document:
    found: Document = group(job, index)["template"]["spec"]
    return found


KUBERAY: dict[str, Break] = {
    "too long": lambda job: job["metadata"].update(name="a" * 48),
    "DNS-1035": lambda job: job["metadata"].update(name="1-job"),
    "submissionMode": lambda job: job["spec"].update(submissionMode="HttpMode"),
    "ttlSecondsAfterFinished": lambda job: job["spec"].update(shutdownAfterJobFinishes=False),
    "suspend": lambda job: job["spec"].update(shutdownAfterJobFinishes=False, suspend=True),
    "backoffLimit": lambda job: job["spec"].update(backoffLimit=-1),
    "InteractiveMode": lambda job: job["spec"].update(submissionMode="InteractiveMode"),
    "SidecarMode": lambda job: job["spec"].update(submissionMode="SidecarMode"),
    "entrypoint": lambda job: job["spec"].pop("entrypoint"),
    "restartPolicy": lambda job: job["spec"]["submitterPodTemplate"]["spec"].update(
        restartPolicy="Always"
    ),
    "rayClusterSpec": lambda job: job["spec"].pop("rayClusterSpec"),
    "authOptions.mode": lambda job: job["spec"]["rayClusterSpec"].pop("authOptions"),
    "rayVersion": lambda job: job["spec"]["rayClusterSpec"].update(rayVersion="2.51.1"),
    "unique": lambda job: group(job, 1).update(groupName="rollout"),
    "minReplicas": lambda job: group(job, 0).update(replicas=2),
    "gang": lambda job: group(job, 2).update(maxReplicas=2),
    "takes no resources": lambda job: group(job, 0).update(rayStartParams={}),
    "labels": lambda job: group(job, 0).update(rayStartParams={"labels": "pool=rollout"}),
    "no containers": lambda job: pod(job, 0).pop("containers"),
    "both in": lambda job: group(job, 0).update(rayStartParams={"num-cpus": "1"}),
}


@pytest.mark.parametrize("word", KUBERAY)
def test_kuberays_rules(job: Document, word: str) -> None:
    KUBERAY[word](job)
    assert any(word in problem for problem in kuberay_problems(job))


HARDENING: dict[str, Break] = {
    "not hardened": lambda job: job["spec"].pop("submitterPodTemplate"),
    "numeric user": lambda job: pod(job, 0)["securityContext"].update(runAsUser=0),
    "seccomp": lambda job: pod(job, 0)["securityContext"].pop("seccompProfile"),
    "Kubernetes API": lambda job: pod(job, 1).pop("automountServiceAccountToken"),
    "hostNetwork": lambda job: pod(job, 1).update(hostNetwork=True),
    "gain privileges": lambda job: pod(job, 2)["containers"][0].pop("securityContext"),
    "keeps capabilities": lambda job: pod(job, 2).update(
        initContainers=[{"name": "fetch", "securityContext": {"allowPrivilegeEscalation": False}}]
    ),
    "root": lambda job: pod(job, 2)["containers"][0]["securityContext"].update(runAsUser=0),
    "memory": lambda job: pod(job, 2)["containers"][0]["resources"]["requests"].pop("memory"),
}


@pytest.mark.parametrize("word", HARDENING)
def test_hardening(job: Document, word: str) -> None:
    HARDENING[word](job)
    assert any(word in problem for problem in hardening_problems(job))


POOLS: dict[str, Break] = {
    "worker groups": lambda job: job["spec"]["rayClusterSpec"]["workerGroupSpecs"].pop(1),
    "offers": lambda job: group(job, 0)["resources"].update(tip_rollout="2"),
    "the pod has": lambda job: pod(job, 2)["containers"][0]["resources"]["limits"].update(cpu="2"),
    "whole number": lambda job: group(job, 0).update(
        replicas=2, resources={"CPU": "0.5", "tip_rollout": "0.5"}
    ),
    "no custom resource": lambda job: job["spec"].update(
        entrypoint=job["spec"]["entrypoint"].replace("--set rollout.resources.tip_rollout=1", "")
    ),
}


@pytest.mark.parametrize("word", POOLS)
def test_pools(job: Document, word: str, tmp_path: Path) -> None:
    POOLS[word](job)
    cluster = ray_cluster(job)
    assert cluster is not None
    assert any(word in one for one in pool_problems(cluster, spec_of(entrypoint(job), tmp_path)))


ROOMS: dict[str, Break] = {
    "head: scratch of 10.7 GB, at least 24.4": lambda head, *_: shrink(head, scratch="10Gi"),
    "rollout: object store of 12.9 GB, at least 16.1": lambda _, one, *__: shrink(one, "40Gi"),
    "teacher: scratch of 10.7 GB, at least 16.4": lambda *pods: shrink(pods[2], scratch="10Gi"),
    "teacher: memory of 8.6 GB, at least 16.4": lambda *pods: shrink(pods[2], "8Gi"),
    "learner: memory of 60.1 GB, at least 64.4": lambda *pods: shrink(pods[3], "56Gi"),
}


def shrink(pod: Document, memory: str | None = None, scratch: str = "200Gi") -> None:
    pod["volumes"][1]["emptyDir"]["sizeLimit"] = scratch
    if memory is not None:
        pod["containers"][0]["resources"]["limits"]["memory"] = memory


@pytest.mark.parametrize("words", ROOMS)
def test_rooms(words: str, tmp_path: Path) -> None:
    (document,) = (one for one in built("qwen3-8b-to-4b-math") if one["kind"] == "RayJob")
    broken = copy.deepcopy(document)
    cluster = ray_cluster(broken)
    assert cluster is not None
    of_head = cluster["headGroupSpec"]["template"]["spec"]
    ROOMS[words](of_head, *(pod(broken, index) for index in range(3)))
    (problem,) = room_problems(cluster, spec_of(entrypoint(broken), tmp_path))
    assert problem.startswith(words)


REFERENCES: dict[str, Break] = {
    "ServiceAccount": lambda job: pod(job, 0).update(serviceAccountName="tipray"),
    "ConfigMap": lambda job: pod(job, 0)["containers"][0].update(
        envFrom=[{"configMapRef": {"name": "storage"}}]
    ),
    "PersistentVolumeClaim": lambda job: pod(job, 1)["volumes"][0]["persistentVolumeClaim"].update(
        claimName="runs"
    ),
    "Secret": lambda job: pod(job, 1)["volumes"].append(
        {"name": "key", "secret": {"secretName": "aws"}}
    ),
    "volume": lambda job: pod(job, 2)["volumes"].pop(),
}


@pytest.mark.parametrize("kind", REFERENCES)
def test_references(job: Document, kind: str) -> None:
    shared = built("storage/volume")
    REFERENCES[kind](job)
    assert [one for one in reference_problems([*shared, job]) if f"there is no {kind}" in one]


def test_a_pod_without_labels_is_not_selected(job: Document) -> None:
    selector = {"matchLabels": {"app.kubernetes.io/part-of": "tip-ray"}}
    count = selected(selector, pod_labels([job]))
    del group(job, 0)["template"]["metadata"]["labels"]["app.kubernetes.io/part-of"]
    assert selected(selector, pod_labels([job])) == count - 1


def test_a_misspelt_field_of_a_core_kind() -> None:
    (deployment,) = (copy.deepcopy(o) for o in built("status") if o["kind"] == "Deployment")
    deployment["spec"]["template"]["spec"]["serviceAcountName"] = "tip-ray"
    with pytest.raises(kubernetes_validate.ValidationError, match="serviceAcountName"):
        kubernetes_validate.validate(deployment, "1.34", strict=True)


def test_a_closed_schema_refuses_unknown_fields_and_waives_defaults() -> None:
    port = {"type": "object", "required": ["port", "protocol"]}
    port["properties"] = {"port": {"type": "integer"}, "protocol": {"default": "TCP"}}
    schema = closed({"type": "object", "properties": {"ports": {"type": "array", "items": port}}})
    assert schema["properties"]["ports"]["items"]["required"] == ["port"]
    assert schema["additionalProperties"] is False
    assert schema["properties"]["ports"]["items"]["additionalProperties"] is False


if os.environ.get(FOLDER):

    @pytest.mark.parametrize("place", ["spec", "group", "pod"])
    def test_a_misspelt_field_of_a_ray_kind(job: Document, place: str) -> None:
        {"spec": job["spec"], "group": group(job, 0), "pod": pod(job, 0)}[place]["replicsa"] = 1
        assert any("replicsa" in problem for problem in schema_problems(job))

    def test_a_wrong_type_in_a_ray_kind(job: Document) -> None:
        group(job, 0)["resources"]["CPU"] = 1
        assert any("workerGroupSpecs.0.resources.CPU" in one for one in schema_problems(job))


def test_a_strategic_merge_that_drops_worker_groups(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "quickstart", tmp_path / "quickstart")
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    groups = {"workerGroupSpecs": [{"groupName": "rollout", "replicas": 1}]}
    patch = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": "any"}}
    patch |= {"spec": {"rayClusterSpec": groups}}
    patches = [{"patch": yaml.safe_dump(patch), "target": {"kind": "RayJob"}}]
    kustomization = yaml.safe_dump({"resources": ["../quickstart"], "patches": patches})
    (overlay / "kustomization.yaml").write_text(kustomization, encoding="utf-8")
    (job,) = (one for one in yaml.safe_load_all(kustomized(overlay)) if one["kind"] == "RayJob")
    cluster = ray_cluster(job)
    assert cluster is not None
    cluster["workerGroupSpecs"][0]["resources"] = {}
    assert next(pool_problems(cluster, spec_of(entrypoint(job), tmp_path))).startswith(
        "worker groups ['rollout'] for the pools"
    )


def test_a_kustomization_that_does_not_build(tmp_path: Path) -> None:
    shutil.copytree(DEPLOY / "quickstart", tmp_path / "quickstart")
    (tmp_path / "quickstart" / "rayjob.yaml").rename(tmp_path / "rayjob.yaml")
    with pytest.raises(AssertionError, match=r"rayjob\.yaml"):
        kustomized(tmp_path / "quickstart")
