"""Find a model; load its config, tokenizer, weights, trunk and head.

V  rows of the LM head        D  width of a hidden state
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import huggingface_hub
import torch
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    StrictDataclassError,
)
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from tip_ray import demo
from tip_ray.contract.errors import SpecError
from tip_ray.stages.reading import one_line, readable

# Config, tokenizer and code: kilobytes to a few megabytes of a checkpoint.
_DESCRIPTION = (".json", ".txt", ".model", ".jinja", ".py")
# Weights as safetensors only: a pickle runs code when it is opened.
_WHOLE = (*_DESCRIPTION, ".safetensors")
_COMPLETE = ".complete"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")

# Config fields with which logits are not simply hidden @ head: (name, value without effect).
_FOREIGN_HEADS = (
    ("final_logit_softcapping", None),  # Gemma
    ("logit_scale", 1.0),  # Cohere
    ("logits_scaling", 1.0),  # Granite
    ("lm_head_multiplier", 1.0),  # Falcon-H1
    ("output_multiplier_scale", 1.0),  # Grok
)


def local_model_path(
    model: str, revision: str | None = None, field: str = "model", *, weights: bool = True
) -> str:
    """The local directory of a checkpoint, downloaded first if need be.

    Args:
        model: `demo:NAME`, a directory, an fsspec URL of a directory, or a hub id.
        revision: branch, tag or commit of a hub id.
        field: the spec's name for `model`, for errors.
        weights: False where config and tokenizer are enough: nothing else is downloaded.

    Raises:
        SpecError: nothing is there, it cannot be reached, or it is no checkpoint.
    """
    is_hub = not (model.startswith(demo.PREFIX) or "://" in model or Path(model).is_dir())
    if revision is not None and not is_hub:
        where = f"{field.rpartition('.')[0]}.revision".lstrip(".")
        raise SpecError(where, repr(revision), "null", f"only a hub id has one, {model} has none")
    if model.startswith(demo.PREFIX):
        path = _demo_path(model, field)
    elif "://" in model:
        path = _fetched(model, field, _WHOLE if weights else _DESCRIPTION)
    elif is_hub:
        path = _from_hub(model, revision, field, _WHOLE if weights else _DESCRIPTION)
    else:
        path = Path(model)
    if not (path / "config.json").is_file():
        expected = "a Hugging Face checkpoint with config.json"
        raise SpecError(field, f"no config.json in {model}", expected, "see save_pretrained")
    return str(path.resolve())


def whole_checkpoint(model: str, revision: str | None, field: str) -> str:
    """The local directory of a checkpoint with all of its weights, downloaded first if need be.

    Raises:
        SpecError: as `local_model_path`, or weights are missing.
    """
    path = local_model_path(model, revision, field)
    if not has_weights(path):
        found, expected = f"no *.safetensors in {model}", "a checkpoint with its weights"
        cure = "save_pretrained writes them; of a hub id, let the hub be reached"
        raise SpecError(field, found, expected, cure)
    return path


def path_on_this_node(
    path: str, model: str, revision: str | None, field: str, *, weights: bool = True
) -> str:
    """`path`, resolved by the driver, or the model fetched again where that is another machine.

    There the same directory may lie without weights, of a model that was only looked at, or with
    some of them, while another process downloads them.

    Raises:
        SpecError: as `local_model_path`.
    """
    there = has_weights(path) if weights else (Path(path) / "config.json").is_file()
    return path if there else local_model_path(model, revision, field, weights=weights)


def has_weights(path: str) -> bool:
    """Whether a local directory holds safetensors: the one file, or every file of its index."""
    index = Path(path) / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return (Path(path) / SAFE_WEIGHTS_NAME).is_file()
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return True  # loading says what is wrong with it
    return all((Path(path) / shard).is_file() for shard in shards)


def _demo_path(model: str, field: str) -> Path:
    try:
        return demo.checkpoint_path(model)
    except ValueError:
        known = " | ".join(demo.PREFIX + name for name in demo.CHECKPOINTS)
        raise SpecError(field, repr(model), known) from None


def _from_hub(model: str, revision: str | None, field: str, suffixes: Sequence[str]) -> Path:
    expected = "a directory, a URL or a hub id"
    if not _HUB_ID.fullmatch(model):
        raise SpecError(field, f"{model!r}, which does not exist", expected, "check the path")
    patterns = [f"*{suffix}" for suffix in suffixes]
    try:
        found = huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        why = f"{model!r}: no such directory, and the hub gave {type(error).__name__}"
        cure = "check the name, the network and HF_TOKEN, or give a local directory"
        raise SpecError(field, why, expected, cure) from None
    return Path(found)


def _fetched(url: str, field: str, suffixes: Sequence[str]) -> Path:
    """The local copy of such files of an fsspec URL's directory; downloaded once, all or none."""
    if url.startswith(("file://", "local://")):
        return Path(fsspec.core.strip_protocol(url))
    with readable(field, url, "a readable directory", "check the URL and its login"):
        fs, root = fsspec.core.url_to_fs(url)
        files = _wanted(fs.find(root, detail=True), root, field, suffixes)
    if not files:
        raise SpecError(field, f"nothing at {url}", "a checkpoint directory", "check the URL")
    digest = hashlib.blake2b(digest_size=12)
    for name, info in sorted(files.items()):
        stamp = next((str(info[key]) for key in _STAMPS if info.get(key)), "")
        digest.update(f"{url}\x1f{name}\x1f{info.get('size')}\x1f{stamp}\x1e".encode())
    cache = model_cache()
    target = cache / f"{PurePosixPath(root).name[:60]}-{digest.hexdigest()}"
    if not (target / _COMPLETE).exists():
        with readable(field, url, "a download that ends", "try again"):
            _download(fs, {name: info["name"] for name, info in files.items()}, cache, target)
    return target


def model_cache() -> Path:
    """Where checkpoints from URLs are kept: $TIP_RAY_CACHE/models, else ~/.cache/tip-ray/models."""
    base = os.environ.get("TIP_RAY_CACHE") or "~/.cache/tip-ray"
    return Path(base).expanduser() / "models"


def _wanted(
    found: dict[str, dict[str, Any]], root: str, field: str, suffixes: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Path inside the checkpoint -> the file's info, for the files with one of `suffixes`."""
    wanted = {}
    for name, info in found.items():
        inside = PurePosixPath(name).relative_to(PurePosixPath(root))
        if ".." in inside.parts or inside.is_absolute():
            raise SpecError(field, f"a file named {inside}", "names inside the directory")
        if inside.suffix in suffixes:
            wanted[str(inside)] = info
    return wanted


def _download(fs: Any, names: dict[str, str], cache: Path, target: Path) -> None:
    """Into a private directory, which takes its name only when it is complete."""
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=cache))
    try:
        for inside, remote in names.items():
            local = partial / inside
            local.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(remote, str(local))
        (partial / _COMPLETE).touch()
        try:
            partial.rename(target)
        except OSError:  # another process was first: its copy is the same
            if not (target / _COMPLETE).exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_config(
    path: str, trust_remote_code: bool = False, field: str = "model"
) -> PretrainedConfig:
    """The text model's config.

    Raises:
        SpecError: it cannot be read, or its code is not trusted.
    """
    try:
        config = AutoConfig.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise _unreadable(field, path, "config", error) from None
    return config.get_text_config()


def load_tokenizer(
    path: str, trust_remote_code: bool = False, field: str = "model"
) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        SpecError: it cannot be read, or its code is not trusted.
    """
    try:
        return AutoTokenizer.from_pretrained(
            path, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(field, path, "tokenizer", error) from None


def load_causal_lm(
    path: str,
    dtype: str,
    trust_remote_code: bool = False,
    device_map: str | dict[str, Any] | None = None,
    field: str = "model",
) -> PreTrainedModel:
    """The model in `dtype`, in evaluation mode, from safetensors only, without a key-value cache.

    Raises:
        SpecError: its weights cannot be read, or its logits are not hidden @ head.
    """
    transformers_logging.disable_progress_bar()  # a bar per actor would garble the run's own lines
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            device_map=device_map,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _unreadable(field, path, "safetensors weights", error) from None
    # With the default cache, packed or repeated calls would see one another's keys.
    model.config.use_cache = False
    trunk_and_head(model, field)
    return model.eval()


def trunk_and_head(
    model: PreTrainedModel, field: str = "model"
) -> tuple[torch.nn.Module, torch.nn.Parameter]:
    """The decoder up to its final norm, and the LM head's weight [V, D]: logits = hidden @ head.T.

    Raises:
        SpecError: the logits are not that (a bias, soft-capping or scaling of logits, no linear
            head): losses and scores of this package would silently be those of another model.
    """
    refuse_foreign_head(model.config.get_text_config(), field)
    trunk, head = model.base_model, model.get_output_embeddings()
    if trunk is model or not isinstance(head, torch.nn.Linear):
        raise _foreign_head(field, f"{type(model).__name__} without a linear LM head")
    if head.bias is not None:
        raise _foreign_head(field, f"{type(model).__name__} whose LM head has a bias")
    return trunk, head.weight


def refuse_foreign_head(config: PretrainedConfig, field: str) -> None:
    """Refuse a model whose config says that its logits are not hidden @ head.

    Raises:
        SpecError: naming the config's field.
    """
    for name, neutral in _FOREIGN_HEADS:
        value = getattr(config, name, neutral)
        if value is not None and value != neutral:
            raise _foreign_head(field, f"{config.model_type} with {name}: {value}")


def _foreign_head(field: str, found: str) -> SpecError:
    expected = "a model whose logits are a plain linear head of its last hidden state"
    return SpecError(field, found, expected, "choose Qwen, Llama or a model like them")


def _unreadable(field: str, path: str, what: str, error: Exception) -> SpecError:
    cure = (
        "set trust_remote_code if you trust its author" if "trust_remote_code" in str(error) else ""
    )
    return SpecError(field, f"{path}: {one_line(error)}", f"a readable {what}", cure)
