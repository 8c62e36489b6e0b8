"""A learner's checkpoint on one rank: where it may lie, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch

from tests.stages.learner_toys import Scenario, play_on_one, save_student, selected
from tip_ray.contract.errors import ReplicaError, RunDirectoryError

NAME = "learner-00000-of-00001.safetensors"


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    folder = tmp_path_factory.mktemp("saved")
    path = save_student(folder / "student", "llama", tied=False)
    steps = [[selected(step, 3, seed=step)] for step in (1, 2)]
    scenario = Scenario("saved", path, steps, dtype="bfloat16", save=str(folder / "checkpoint"))
    play_on_one(scenario)
    return scenario


def resume(scenario: Scenario, url: str, steps=()):
    return play_on_one(replace(scenario, steps=steps, load=url, save=""))


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(scenario) -> None:
    third = [selected(3, 4, seed=3)]
    whole = play_on_one(replace(scenario, steps=[*scenario.steps, third], save=""))
    resumed = resume(scenario, scenario.save, [third])
    assert all(torch.equal(resumed.weights[3][name], own) for name, own in whole.weights[3].items())
    assert all(torch.equal(resumed.moments[name], own) for name, own in whole.moments.items())
    assert resumed.reports[0].learning_rate == whole.reports[2].learning_rate


def test_a_checkpoint_before_the_first_step_starts_as_from_the_model(scenario, tmp_path) -> None:
    play_on_one(replace(scenario, steps=[], save=str(tmp_path)))
    fresh = play_on_one(replace(scenario, save=""))
    resumed = resume(scenario, str(tmp_path), scenario.steps)
    assert all(torch.equal(resumed.weights[2][name], own) for name, own in fresh.weights[2].items())


def test_an_object_store_holds_the_same_file(scenario) -> None:
    fs = fsspec.filesystem("memory")
    saved = play_on_one(replace(scenario, save="memory://learner/state")).saved
    kept = Path(scenario.save, NAME).read_bytes()
    assert fs.cat_file(f"/learner/state/{NAME}") == kept
    assert saved.nbytes == len(kept)
    resumed, local = resume(scenario, "memory://learner/state"), resume(scenario, scenario.save)
    assert all(torch.equal(resumed.moments[name], own) for name, own in local.moments.items())
    fs.rm("/learner", recursive=True)


def test_saving_leaves_nothing_else_behind(scenario) -> None:
    assert [path.name for path in Path(scenario.save).iterdir()] == [NAME]


def test_the_state_of_another_step_is_not_saved(scenario, tmp_path) -> None:
    actor = scenario.actor(0)
    actor.join("localhost", actor.open_port(), 1)
    with pytest.raises(ReplicaError, match="asked for the state of step 3 after step 0"):
        actor.save(str(tmp_path), 3)
    actor.close()


def test_a_directory_without_state_is_refused(scenario, tmp_path) -> None:
    with pytest.raises(RunDirectoryError, match="no file of a learner's state"):
        resume(scenario, str(tmp_path))


def test_files_of_two_checkpoints_are_refused(scenario, tmp_path) -> None:
    shutil.copy(Path(scenario.save, NAME), tmp_path)
    later = Path(scenario.save, NAME).read_bytes().replace(b'\\"step\\": 2', b'\\"step\\": 3')
    (tmp_path / "learner-00001-of-00001.safetensors").write_bytes(later)
    with pytest.raises(RunDirectoryError, match="of different steps or groups"):
        resume(scenario, str(tmp_path))


def test_a_broken_file_is_refused(scenario, tmp_path) -> None:
    (tmp_path / NAME).write_bytes(Path(scenario.save, NAME).read_bytes()[:-100])
    with pytest.raises(RunDirectoryError, match=f"{NAME} cannot be read"):
        resume(scenario, str(tmp_path))


def test_another_students_state_is_refused(scenario, tmp_path) -> None:
    tied = save_student(tmp_path / "tied", "llama", tied=True)
    with pytest.raises(RunDirectoryError, match=r"another student's: they differ in lm_head"):
        resume(replace(scenario, path=tied), scenario.save)
    shutil.rmtree(tied)
