"""Before a run: what does not fit is refused, and a hub's weights are the last to be downloaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects

from tests.runs_made import QUICKSTART
from tests.stages.toys import save_model
from tip_ray.cli import main
from tip_ray.contract.errors import SpecError
from tip_ray.contract.spec import RunSpec
from tip_ray.control import driver
from tip_ray.control.plan_devices import DEVICE_VARIABLE
from tip_ray.control.preflight import ready_to_start
from tip_ray.control.spec_file import dump_spec, load_spec
from tip_ray.stages.models import has_weights, load_causal_lm

LLAMA = QUICKSTART.parent / "llama3-70b-to-8b-math.yaml"
WEIGHTS = "*.safetensors"


class Hub:
    """`snapshot_download` of the repositories under `root`, into one folder a repository."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.root, self.cache = root, cache
        self.asked: list[tuple[str, str | None, bool]] = []  # with weights

    def snapshot_download(
        self, repo_id: str, *, revision: str | None, allow_patterns: Sequence[str]
    ) -> str:
        self.asked.append((repo_id, revision, WEIGHTS in allow_patterns))
        source, target = self.root / repo_id, self.cache / repo_id
        names = [path.name for path in source.iterdir()] if source.exists() else []
        if not names:
            raise OfflineModeIsEnabled("no such repository")
        target.mkdir(parents=True, exist_ok=True)
        for name in filter_repo_objects(names, allow_patterns=list(allow_patterns)):
            shutil.copyfile(source / name, target / name)
        return str(target)

    def asked_for_weights(self) -> list[str]:
        return [repo_id for repo_id, _, weights in self.asked if weights]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """With a toy pair; reaching Ray would be a TypeError, exit 1."""
    made = Hub(tmp_path / "hub", tmp_path / "cache")
    for seed, name in enumerate(("small", "large")):
        save_model(made.root / "org" / name, seed)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    monkeypatch.setattr(driver, "connected", None)
    monkeypatch.chdir(tmp_path)
    return made


def on_hub(tmp_path: Path, **changes: Any) -> tuple[RunSpec, str]:
    """A spec that names the toy pair by hub ids, and its file."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"problem": "what is 1 + 2 ?"}) + "\n")
    own = {
        "student.model": "org/small",
        "teacher.model": "org/large",
        "prompts.source": str(prompts),
        "evaluation": [],
        "run_root": str(tmp_path / "runs"),
    }
    spec = load_spec(QUICKSTART, own | changes)
    path = tmp_path / "spec.yaml"
    path.write_text(dump_spec(spec))
    return spec, str(path)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line of a command that is refused; no run directory is left."""
    assert main([*argv]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert not Path("runs").exists()
    return error


def test_validate_downloads_no_weights(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, path = on_hub(tmp_path)
    assert main(["validate", path]) == 0
    out = capsys.readouterr().out
    assert hub.asked == [("org/small", None, False), ("org/large", None, False)]
    assert (hub.cache / "org/small/tokenizer.json").exists()
    assert not list(hub.cache.rglob(WEIGHTS))
    assert "plan, with the models read" in out
    assert f"{path}: good" in out


def test_a_run_downloads_the_weights_once_all_else_is_good(hub: Hub, tmp_path: Path) -> None:
    checked = ready_to_start(on_hub(tmp_path, **{"student.revision": "v1"})[0])
    models = [("org/small", "v1"), ("org/large", None)]
    assert hub.asked == [(*one, weights) for weights in (False, True) for one in models]
    for path in (checked.facts.student_path, checked.facts.teacher_path):
        assert has_weights(path)
        assert load_causal_lm(path, "float32").config.vocab_size == 32


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"prompts.field": "question"}, "prompts.field"),
        ({"rollout.max_response_tokens": 60}, "rollout.max_response_tokens"),
        ({"teacher.model": "org/nowhere"}, "teacher.model"),
    ],
)
def test_a_run_that_is_refused_downloads_no_weights(
    hub: Hub,
    tmp_path: Path,
    changes: dict[str, Any],
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, path = on_hub(tmp_path, **changes)
    assert refused(capsys, "run", path).startswith(f"error: {named}: found ")
    assert hub.asked_for_weights() == []


def test_a_checkpoint_without_safetensors_is_refused(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (hub.root / "org/large/model.safetensors").rename(hub.root / "org/large/pytorch_model.bin")
    _, path = on_hub(tmp_path)
    line = refused(capsys, "run", path)
    assert "teacher.model: found no *.safetensors in org/large, expected a checkpoint with" in line


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "llama", "hidden_size": "a"}'])
def test_a_broken_config_is_one_line(
    hub: Hub, tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "broken"
    shutil.copytree(hub.root / "org/small", model)
    (model / "config.json").write_text(content)
    _, path = on_hub(tmp_path, **{"student.model": str(model)})
    assert refused(capsys, "run", path).startswith("error: student.model: found ")
    assert refused(capsys, "validate", path).startswith("error: student.model: found ")


def test_an_evaluation_alone_wants_weights(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (hub.root / "org/small/model.safetensors").unlink()
    _, path = on_hub(tmp_path)
    evaluation = '[{"name": "e", "source": "demo:carry-eval", "every_steps": 1, "scorer": "exact"}]'
    line = refused(
        capsys, "eval", path, "--model", "org/small", "--set", f"evaluation={evaluation}"
    )
    assert "student.model: found no *.safetensors in org/small" in line


def test_a_run_whose_model_does_not_fit_asks_no_hub(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["run", str(LLAMA), "--run-root", "runs", "--set", "teacher.num_gpus=1"]
    line = refused(capsys, *argv)
    assert line.startswith("error: teacher.num_gpus: found 146.8 GB a device (weights")
    assert "expected at most 80.0 GB of H100" in line
    assert "set teacher.num_gpus to 2, or TIP_RAY_DEVICE_GB=GB if your devices have more" in line
    assert hub.asked == []
    monkeypatch.setenv(DEVICE_VARIABLE, "192")
    assert refused(capsys, *argv).startswith("error: student.model: found 'meta-llama/")
    assert len(hub.asked) == 1


def test_a_model_that_its_config_says_is_too_large_is_not_downloaded(
    hub: Hub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec, path = on_hub(tmp_path, **{"learner.num_gpus": 1})
    monkeypatch.setenv(DEVICE_VARIABLE, "1e-4")  # 100 kB
    assert "of a GPU of 0.0001 GB" in refused(capsys, "run", path)
    assert hub.asked_for_weights() == []
    monkeypatch.setenv(DEVICE_VARIABLE, "1")
    ready_to_start(spec)
    assert hub.asked_for_weights() == ["org/small", "org/large"]


@pytest.mark.parametrize("said", ["1e-9", "much"])
def test_without_gpus_no_devices_are_asked_for(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICE_VARIABLE, said)
    assert ready_to_start(load_spec(QUICKSTART)).facts.vocab_size == 15
    with pytest.raises(SpecError):
        ready_to_start(load_spec(QUICKSTART, {"teacher.num_gpus": 1}))
