"""A checkpoint as a Hugging Face model: what rows of any ranks become, and what is refused."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.runs_made import made_run
from tip_ray.contract.errors import NotFoundError, RunDirectoryError
from tip_ray.contract.headers import QuadrantThresholds
from tip_ray.control.checkpoint import Manifest, ManifestFile
from tip_ray.control.export import export_checkpoint
from tip_ray.control.run_directory import RunDirectory
from tip_ray.control.run_reader import RunReader
from tip_ray.demo import checkpoint_path
from tip_ray.stages.state import Header, first_row, read_parameters, save_rows

STUDENT = checkpoint_path("carry-student")


def parameters(scale: float) -> dict[str, torch.Tensor]:
    """The demo student's own, in float32, times `scale`."""
    model = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.float32)
    return {name: tensor.detach() * scale for name, tensor in model.named_parameters()}


def save_checkpoint(
    directory: RunDirectory, step: int, whole: dict[str, torch.Tensor], ranks: int
) -> None:
    """As `ranks` learner ranks would have written it, and its manifest."""
    name = f"checkpoints/step-{step:08d}"
    shapes = {one: tuple(tensor.shape) for one, tensor in whole.items()}
    files = []
    for rank in range(ranks):
        rows = {
            f"parameter/{one}": tensor[
                first_row(len(tensor), rank, ranks) : first_row(len(tensor), rank + 1, ranks)
            ]
            for one, tensor in whole.items()
        }
        header = Header(step, step, rank, ranks, shapes)
        files.append(save_rows(f"{directory.storage.url}/{name}", header, rows))
    manifest = Manifest(
        step=step,
        weight_version=step,
        seed=0,
        cursor={},
        frozen_thresholds=QuadrantThresholds(0.5, 0.5),
        files=tuple(ManifestFile.model_validate(asdict(one)) for one in files),
    )
    directory.storage.write(f"{name}/manifest.json", manifest.model_dump_json().encode())


def no_warning(line: str) -> None:
    raise AssertionError(line)


@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_any_number_of_ranks_gives_the_same_model(tmp_path: Path, ranks: int) -> None:
    directory, whole = made_run(tmp_path, "a-run"), parameters(0.5)
    save_checkpoint(directory, 4, whole, ranks)
    reader, output = RunReader(directory.url), tmp_path / "out"
    assert export_checkpoint(reader, None, str(output), no_warning) == 4
    found = load_file(output / "model.safetensors")
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16)), name
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    assert (output / "tokenizer.json").read_bytes() == (STUDENT / "tokenizer.json").read_bytes()
    AutoModelForCausalLM.from_pretrained(output)  # what transformers takes for a whole model


def test_from_and_to_another_file_system(tmp_path: Path) -> None:
    directory, whole = made_run("memory://export-runs", "a-run"), parameters(2.0)
    save_checkpoint(directory, 2, whole, 3)
    reader = RunReader("memory://export-runs/a-run")
    assert export_checkpoint(reader, None, "memory://export-out", no_warning) == 2
    content = fsspec.filesystem("memory").cat_file("/export-out/model.safetensors")
    (tmp_path / "found").write_bytes(content)
    found = load_file(tmp_path / "found")
    assert all(torch.equal(found[name], whole[name].to(torch.bfloat16)) for name in whole)


def test_broken_ones_are_refused_by_step_and_skipped_without(tmp_path: Path) -> None:
    directory = made_run(tmp_path, "a-run")
    for step, scale in ((4, 0.5), (8, 0.25)):
        save_checkpoint(directory, step, parameters(scale), 2)
    newest = Path(directory.url) / "checkpoints" / "step-00000008"
    file = newest / "learner-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    reader, output, warned = RunReader(directory.url), tmp_path / "out", []
    with pytest.raises(RunDirectoryError, match=r"learner-00001-of-00002.*SHA-256"):
        export_checkpoint(reader, 8, str(output), no_warning)
    assert not output.exists()
    assert export_checkpoint(reader, None, str(output), warned.append) == 4
    assert len(warned) == 1
    assert "step 8" in warned[0]
    name, tensor = next(iter(parameters(0.5).items()))
    assert torch.equal(load_file(output / "model.safetensors")[name], tensor.to(torch.bfloat16))


def test_what_is_not_there(tmp_path: Path) -> None:
    directory = made_run(tmp_path, "a-run")
    reader = RunReader(directory.url)
    with pytest.raises(NotFoundError, match="a-run: no checkpoint that is whole"):
        export_checkpoint(reader, None, str(tmp_path / "out"), no_warning)
    with pytest.raises(NotFoundError, match="after step 3; there are: none"):
        export_checkpoint(reader, 3, str(tmp_path / "out"), no_warning)
    save_checkpoint(directory, 4, parameters(1.0), 1)
    with pytest.raises(NotFoundError, match="after step 3; there are: 4"):
        export_checkpoint(reader, 3, str(tmp_path / "out"), no_warning)


def test_rows_of_a_missing_rank_are_never_made_up(tmp_path: Path) -> None:
    directory, whole = made_run(tmp_path, "a-run"), parameters(1.0)
    save_checkpoint(directory, 4, whole, 3)
    folder = Path(directory.url) / "checkpoints" / "step-00000004"
    (folder / "learner-00001-of-00003.safetensors").unlink()
    with pytest.raises(RunDirectoryError, match="rank 1 is missing"):
        list(read_parameters(str(folder)))
