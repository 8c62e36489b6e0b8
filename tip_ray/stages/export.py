"""Writing a model as Hugging Face stores it: a directory that is complete or not there.

On a local file system the directory appears by a rename. Elsewhere config.json goes last: without
it no loader takes the directory for a model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import torch
from fsspec.implementations.local import LocalFileSystem
from safetensors.torch import save_file

SHARD_BYTES = 4 * 2**30  # one weights file; transformers' own default is about as large
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# What makes a checkpoint directory usable beside its weights.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "*.py",
    "LICENSE*",
)


def write_export(
    url: str, model_path: str, groups: Iterable[dict[str, torch.Tensor]], dtype: str
) -> list[str]:
    """Write the tensors of `groups` to the directory `url`, with all else as in `model_path`.

    A directory that was there is replaced. Returns the names of the files written.
    """
    with tempfile.TemporaryDirectory(prefix="tip-ray-export-") as folder:
        made = Path(folder)
        _write_weights(made, groups)
        _write_companions(made, Path(model_path), dtype)
        _place(made, url)
        return sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())


def _write_weights(folder: Path, groups: Iterable[dict[str, torch.Tensor]]) -> None:
    files: list[Path] = []
    weight_map: dict[str, int] = {}
    total_bytes = 0
    for number, tensors in enumerate(_shards(groups)):
        files.append(folder / f"part-{number}")
        save_file(tensors, files[-1], metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, number)
        total_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) == 1:
        files[0].rename(folder / WEIGHTS)
        return
    names = [f"model-{n + 1:05d}-of-{len(files):05d}.safetensors" for n in range(len(files))]
    for file, name in zip(files, names, strict=True):
        file.rename(folder / name)
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": {tensor: names[number] for tensor, number in sorted(weight_map.items())},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _shards(groups: Iterable[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    """Regroup into files of at most SHARD_BYTES (a larger tensor is a file of its own)."""
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for group in groups:
        for name, tensor in group.items():
            if shard and size + tensor.nbytes > SHARD_BYTES:
                yield shard
                shard, size = {}, 0
            shard[name] = tensor.contiguous()
            size += tensor.nbytes
    yield shard


def _write_companions(folder: Path, source: Path, dtype: str) -> None:
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
    config: dict[str, Any] = json.loads((source / CONFIG).read_text())
    config.pop("torch_dtype", None)  # the older name of the same
    config["dtype"] = dtype
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _place(made: Path, url: str) -> None:
    fs, path = fsspec.core.url_to_fs(url)
    target = path.rstrip("/")
    if isinstance(fs, LocalFileSystem):
        _place_local(made, Path(target))
        return
    if fs.exists(target):
        fs.rm(target, recursive=True)
    fs.makedirs(target, exist_ok=True)
    files = sorted(made.iterdir(), key=lambda path: path.name == CONFIG)
    for file in files:
        fs.put_file(str(file), f"{target}/{file.name}")


def _place_local(made: Path, target: Path) -> None:
    """Copy beside `target`, then rename: readers see the old directory, none, or the new one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    shutil.copytree(made, fresh)
    if target.exists():
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        target.rename(old)
        fresh.rename(target)
        shutil.rmtree(old)
    else:
        fresh.rename(target)
