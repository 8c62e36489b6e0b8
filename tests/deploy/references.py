"""What a set of manifests applied together refers to, and what selects what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tests.deploy.manifests import Document, containers, templates

SECRETS = {"tip-ray-status", "tip-ray-s3"}  # made by hand, as the README says


def reference_problems(documents: Iterable[Document]) -> Iterator[str]:
    """Accounts, ConfigMaps, claims and volumes that a pod names and nobody makes."""
    documents = list(documents)
    made = {(one["kind"], one["metadata"]["name"]) for one in documents}
    made |= {("Secret", name) for name in SECRETS}
    for document in documents:
        for what, template in templates(document):
            for kind, name in sorted(_named(template)):
                if (kind, name) not in made:
                    yield f"{what}: there is no {kind} {name}"
            volumes = {one["name"] for one in template["spec"].get("volumes", [])}
            for container in containers(template):
                for mount in container.get("volumeMounts", []):
                    if mount["name"] not in volumes:
                        yield f"{what}: there is no volume {mount['name']}"


def _named(template: Document) -> set[tuple[str, str]]:
    pod = template["spec"]
    named = {("ServiceAccount", pod["serviceAccountName"])}
    for volume in pod.get("volumes", []):
        if "persistentVolumeClaim" in volume:
            named.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
        if "configMap" in volume:
            named.add(("ConfigMap", volume["configMap"]["name"]))
        if "secret" in volume:
            named.add(("Secret", volume["secret"]["secretName"]))
    for container in containers(template):
        for source in container.get("envFrom", []):
            named.add(("ConfigMap", source["configMapRef"]["name"]))
    return named


def pod_labels(documents: Iterable[Document]) -> list[dict[str, str]]:
    """Labels of every pod at once: a worker group's template counts once a replica."""
    found = []
    for document in documents:
        for what, template in templates(document):
            labels = dict(template["metadata"]["labels"])
            if "ray" in document["apiVersion"] and what != "submitter":  # KubeRay's own label
                labels["ray.io/node-type"] = "head" if what == "head" else "worker"
            found += [labels] * _replicas(document, what)
    return found


def _replicas(document: Document, what: str) -> int:
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    for group in spec.get("workerGroupSpecs", []):
        if group["groupName"] == what:
            return int(group["replicas"])
    return 1


def selected(selector: Document, labels: Iterable[dict[str, str]]) -> int:
    """How many of the pods a selector of labels picks."""
    wanted = selector.get("matchLabels", {}).items()
    return sum(wanted <= one.items() for one in labels)
