"""What a manifest has to keep; each check returns its complaints, none if all is well."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from tests.deploy.manifests import Document, containers, ray_cluster, templates
from tip_ray.contract.spec import RunSpec
from tip_ray.control.placement import demand

DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LONGEST_NAME = {"RayJob": 47, "RayCluster": 53}
SUBMISSION_MODES = {"K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"}
FIRST_RAY_WITH_TOKENS = (2, 52)
RESERVED_START_PARAMS = {"num-cpus", "num-gpus", "memory", "resources"}
PULLED_BY_POD = {"CPU": "cpu", "GPU": "nvidia.com/gpu"}


def kuberay_problems(document: Document) -> Iterator[str]:
    """The rules that KubeRay's operator applies after the API server has taken a document."""
    cluster = ray_cluster(document)
    name = document["metadata"]["name"]
    if document["kind"] not in LONGEST_NAME:
        return
    if len(name) > LONGEST_NAME[document["kind"]] or not DNS_1035.fullmatch(name):
        yield f"name {name!r} is too long, or not DNS-1035"
    if document["kind"] == "RayJob":
        yield from _job_problems(document["spec"])
    if cluster is None:
        yield "no rayClusterSpec"
        return
    yield from _auth_problems(cluster)
    groups = cluster.get("workerGroupSpecs", [])
    names = [group["groupName"] for group in groups]
    if len(set(names)) < len(names):
        yield f"group names {names} are not unique"
    for group in groups:
        yield from _group_problems(group)


def _job_problems(job: Document) -> Iterator[str]:
    mode = job.get("submissionMode", "K8sJobMode")
    if mode not in SUBMISSION_MODES:
        yield f"submissionMode {mode!r}"
    if not job.get("shutdownAfterJobFinishes"):
        if job.get("ttlSecondsAfterFinished", 0) > 0:
            yield "ttlSecondsAfterFinished needs shutdownAfterJobFinishes"
        if job.get("suspend"):
            yield "suspend needs shutdownAfterJobFinishes"
    if job.get("backoffLimit", 0) < 0 or job.get("activeDeadlineSeconds", 1) <= 0:
        yield "backoffLimit or activeDeadlineSeconds is out of range"
    if mode == "InteractiveMode" and (job.get("backoffLimit") or job.get("jobId")):
        yield "InteractiveMode takes neither backoffLimit nor jobId"
    if mode != "InteractiveMode" and not job.get("entrypoint"):
        yield "no entrypoint"
    if mode == "SidecarMode" and {"submitterPodTemplate", "submitterConfig"} & set(job):
        yield "SidecarMode has no submitter pod"
    submitter = job.get("submitterPodTemplate", {}).get("spec", {})
    if submitter and submitter.get("restartPolicy") not in {"Never", "OnFailure"}:
        yield "a submitter's restartPolicy is Never or OnFailure"


def _auth_problems(cluster: Document) -> Iterator[str]:
    if cluster.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode is not token"
    version = tuple(int(part) for part in cluster.get("rayVersion", "0.0").split(".")[:2])
    if version < FIRST_RAY_WITH_TOKENS:
        yield "authOptions needs rayVersion >= 2.52"


def _group_problems(group: Document) -> Iterator[str]:
    name, least, most = group["groupName"], group["minReplicas"], group["maxReplicas"]
    if not least <= group.get("replicas", 0) <= most:
        yield f"{name}: replicas are not within minReplicas and maxReplicas"
    if name == "learner" and least != most:
        yield "learner: its ranks are a gang, minReplicas must be maxReplicas"
    if group.get("resources") and RESERVED_START_PARAMS & set(group.get("rayStartParams", {})):
        yield f"{name}: resources both in resources and rayStartParams"
    if group.get("resources") and not group.get("rayStartParams"):
        yield f"{name}: rayStartParams is empty, is left out on the way, and takes no resources"
    if "labels" in group.get("rayStartParams", {}):
        yield f"{name}: labels belong beside rayStartParams"
    if not group["template"]["spec"].get("containers"):
        yield f"{name}: no containers"


def hardening_problems(document: Document) -> Iterator[str]:
    """Every pod: a numeric user that is not root, nothing it could gain, no token of the API."""
    if document["kind"] == "RayJob" and "submitterPodTemplate" not in document["spec"]:
        yield "submitter: KubeRay's own pod is not hardened"
    for what, template in templates(document):
        pod = template["spec"]
        security = pod.get("securityContext", {})
        if security.get("runAsNonRoot") is not True or not security.get("runAsUser"):
            yield f"{what}: does not run as a numeric user that is not root"
        if security.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{what}: no seccomp profile"
        if pod.get("automountServiceAccountToken") is not False:
            yield f"{what}: gets a token of the Kubernetes API"
        for host in ("hostNetwork", "hostPID", "hostIPC"):
            if pod.get(host):
                yield f"{what}: {host}"
        for container in containers(template):
            yield from _container_problems(f"{what}/{container['name']}", container)


def _container_problems(what: str, container: Document) -> Iterator[str]:
    security = container.get("securityContext", {})
    if security.get("allowPrivilegeEscalation") is not False or security.get("privileged"):
        yield f"{what}: may gain privileges"
    if security.get("capabilities") != {"drop": ["ALL"]}:
        yield f"{what}: keeps capabilities"
    if security.get("runAsUser") == 0 or security.get("runAsNonRoot") is False:
        yield f"{what}: root"
    resources = container.get("resources", {})
    memory = {kind: resources.get(kind, {}).get("memory") for kind in ("requests", "limits")}
    if not memory["requests"] or memory["requests"] != memory["limits"]:
        yield f"{what}: memory asked for is not its limit"


def pool_problems(cluster: Document, spec: RunSpec) -> Iterator[str]:
    """Each pool has a worker group of its name that offers exactly what its replicas ask for."""
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    pools = demand(spec)
    if set(groups) != set(pools):
        yield f"worker groups {sorted(groups)} for the pools {sorted(pools)}"
    for pool in sorted(set(groups) & set(pools)):
        bundles, group = pools[pool], groups[pool]
        offered = {name: float(amount) for name, amount in group["resources"].items()}
        total = {name: amount * group["replicas"] for name, amount in offered.items()}
        asked = {name: amount * len(bundles) for name, amount in bundles[0].items()}
        if total != asked:
            yield f"{pool}: the group offers {total}, the pool asks for {asked}"
        elif any(offered[name] % amount for name, amount in bundles[0].items()):
            yield f"{pool}: {offered} on a node is no whole number of replicas {bundles[0]}"
        if not any(name not in PULLED_BY_POD for name in bundles[0]):
            yield f"{pool}: asks for no custom resource, so it may land on another pool's nodes"
        yield from _pod_size_problems(pool, group, offered)


def _pod_size_problems(pool: str, group: Document, offered: dict[str, float]) -> Iterator[str]:
    limits: dict[str, Any] = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    for name, of_pod in PULLED_BY_POD.items():
        if float(limits.get(of_pod, 0)) != offered.get(name, 0.0):
            yield f"{pool}: the pod has {limits.get(of_pod, 0)} {of_pod}, Ray is told {name}"
