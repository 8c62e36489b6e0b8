"""The manifests build, are what the API server and KubeRay take, and fit the specs they run."""

from __future__ import annotations

import os
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.deploy.entrypoints import entrypoint, mounted_spec, options_of, spec_of, submitted
from tests.deploy.manifests import (
    DEPLOY,
    REPOSITORY,
    Document,
    all_documents,
    built,
    kustomizations,
    ray_cluster,
    templates,
)
from tests.deploy.references import pod_labels, reference_problems, selected
from tests.deploy.rooms import room_problems
from tests.deploy.rules import hardening_problems, kuberay_problems, pool_problems
from tests.deploy.schemas import FILES, FOLDER, schema_problems
from tip_ray.cli import main
from tip_ray.control.run_directory import (
    RAY_JOB_VARIABLE,
    RUN_ROOT_VARIABLE,
    check_run_id,
    resolve_run_root,
)

KUBERNETES = "1.34"
DOCUMENTS = all_documents()
RAY = [(name, one) for name, one in DOCUMENTS if one["kind"] in FILES]
CORE = [(name, one) for name, one in DOCUMENTS if one["kind"] not in FILES]
JOBS = [(name, one) for name, one in RAY if one["kind"] == "RayJob"]
PODS = [(name, one) for name, one in DOCUMENTS if list(templates(one))]
WORKLOADS = [one for one in kustomizations() if not one.startswith(("base", "storage"))]


def each(documents: list[tuple[str, Document]]) -> pytest.MarkDecorator:
    names = [name for name, _ in documents]
    return pytest.mark.parametrize("document", [one for _, one in documents], ids=names)


def shared_with(folder: str) -> tuple[Document, ...]:
    """What is applied beside a workload."""
    in_a_bucket = "tip-ray-s3" in str(built(folder))
    return built("storage/s3" if in_a_bucket else "storage/volume")


def test_every_file_is_part_of_a_kustomization() -> None:
    used = set()
    for path in DEPLOY.rglob("kustomization.yaml"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        listed = [*content.get("resources", []), *content.get("components", [])]
        listed += [one["path"] for one in content.get("patches", []) if "path" in one]
        used |= {path, *((path.parent / one).resolve() for one in listed)}
    assert set(DEPLOY.rglob("*.yaml")) <= used
    for name in kustomizations():
        assert built(name), name


@each(CORE)
def test_core_kinds_pass_the_schema_of_kubernetes(document: Document) -> None:
    kubernetes_validate.validate(document, KUBERNETES, strict=True)


@each(RAY)
def test_ray_kinds_pass_kuberays_rules(document: Document) -> None:
    assert list(kuberay_problems(document)) == []


if os.environ.get(FOLDER):

    @each(RAY)
    def test_ray_kinds_pass_the_closed_schema(document: Document) -> None:
        assert schema_problems(document) == []


@each(PODS)
def test_every_pod_is_hardened(document: Document) -> None:
    assert list(hardening_problems(document)) == []


@pytest.mark.parametrize("folder", WORKLOADS)
def test_what_a_workload_names_exists(folder: str) -> None:
    assert list(reference_problems([*shared_with(folder), *built(folder)])) == []


@pytest.mark.parametrize("folder", WORKLOADS)
def test_every_pod_is_denied_traffic_by_default(folder: str) -> None:
    (policy,) = (one for one in built("base") if one["metadata"]["name"] == "tip-ray-default")
    labels = pod_labels(built(folder))
    assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policy["spec"]
    assert selected(policy["spec"]["podSelector"], labels) == len(labels) > 0


def test_every_policy_and_service_picks_pods() -> None:
    labels = [one for folder in WORKLOADS for one in pod_labels(built(folder))]
    for name, document in DOCUMENTS:
        if document["kind"] == "NetworkPolicy":
            assert selected(document["spec"]["podSelector"], labels), name
        if document["kind"] == "Service":
            assert selected({"matchLabels": document["spec"]["selector"]}, labels), name


@pytest.mark.parametrize("folder", WORKLOADS)
def test_a_budget_keeps_as_many_pods_as_it_picks(folder: str) -> None:
    # More would be an eviction that is never granted to anybody, fewer one of a part of the run.
    documents = built(folder)
    budgets = [one["spec"] for one in documents if one["kind"] == "PodDisruptionBudget"]
    assert len(budgets) == any(one["kind"] in FILES for one in documents)
    for budget in budgets:
        assert selected(budget["selector"], pod_labels(documents)) == budget["minAvailable"]


@each(JOBS)
def test_a_jobs_groups_are_what_its_spec_asks_for(document: Document, tmp_path: Path) -> None:
    options = entrypoint(document)
    assert check_run_id(options.run_id)  # literal: a retry on a new cluster resumes
    cluster = ray_cluster(document)
    assert cluster is not None
    spec = spec_of(options, tmp_path)
    assert list(pool_problems(cluster, spec)) == []
    assert list(room_problems(cluster, spec)) == []


@pytest.mark.parametrize("folder", [one for one in WORKLOADS if "RayJob" in str(built(one))])
def test_runs_lie_where_the_status_service_looks(folder: str, tmp_path: Path) -> None:
    told = {one["metadata"]["name"]: one["data"] for one in shared_with(folder) if "data" in one}
    storage = told["tip-ray-storage"]
    for job in (one for one in built(folder) if one["kind"] == "RayJob"):
        options = entrypoint(job)
        root = options.run_root or spec_of(options, tmp_path).run_root
        known = {**storage, RAY_JOB_VARIABLE: "{}"}
        assert resolve_run_root(root, known) == f"{storage[RUN_ROOT_VARIABLE]}/runs"


def test_the_long_lived_cluster_fits_what_the_readme_submits(tmp_path: Path) -> None:
    (cluster,) = (one["spec"] for one in built("cluster") if one["kind"] == "RayCluster")
    runs = submitted()
    assert runs
    for options in runs:
        assert list(pool_problems(cluster, spec_of(options, tmp_path))) == []


def test_the_quickstarts_entrypoint_validates(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (job,) = (one for one in built("quickstart") if one["kind"] == "RayJob")
    options = entrypoint(job)
    path = str(mounted_spec(options, tmp_path))
    words = [word for one in options.assignments for word in ("--set", one)]
    assert main(["run", path, "--run-id", options.run_id, *words, "--dry-run"]) == 0
    assert "good" in capsys.readouterr().out


def test_the_config_map_holds_every_spec_as_it_is() -> None:
    (specs,) = (one for one in built("base") if one["metadata"]["name"] == "tip-ray-job-specs")
    assert set(specs["data"]) == {path.name for path in (REPOSITORY / "job_specs").glob("*.yaml")}
    for name, text in specs["data"].items():
        assert text == (REPOSITORY / "job_specs" / name).read_text(encoding="utf-8")


def test_the_status_service_is_asked_where_it_listens() -> None:
    (deployment,) = (one for one in built("status") if one["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    options = options_of(" ".join([*container["command"], *container["args"]]))
    (port,) = container["ports"]
    assert (options.command, options.port) == ("serve", port["containerPort"])
    assert options.host == "0.0.0.0"  # noqa: S104
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": port["name"]}
    mounts = [Path(one["mountPath"]) for one in container["volumeMounts"]]
    assert Path(options.token_file).parent in mounts
