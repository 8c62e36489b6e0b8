"""Spec files: YAML in, RunSpec out, and back.

`load_spec` reads a path or fsspec URL; `--set a.b=v` assignments are laid over it before it is
parsed, so both fail with the same one-line errors.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from tip_ray.contract.errors import SpecError
from tip_ray.contract.spec import RunSpec
from tip_ray.contract.spec_check import parse_spec
from tip_ray.control.storage import storage_errors

MAX_NODES = 20_000  # of a YAML document with its aliases written out

# May differ when a run is resumed; every other field may not.
RESUMABLE = ("steps", "evaluation", "checkpoint", "tracking", "faults", "run_root")
RESUMABLE_OF_POOLS = ("replicas", "num_cpus", "num_gpus", "resources")
POOLS = ("rollout", "teacher", "learner")

_SECRET_NAME = re.compile(
    r"(^|[_-])(token|secret|password|passwd|credentials?|(api|access|private)[_-]?key)$", re.I
)
_URL_PASSWORD = re.compile(r"(?<=://)([^/@\s:]*):[^/@\s]+@")
_URL_SIGNATURE = re.compile(r"(?i)([?&][\w-]*(?:signature|sig|token|credential|key)=)[^&\s]+")
_REDACTED = "***"

_FLOAT = re.compile(r"^[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")  # YAML 1.2: 3e-4 too


class Difference(NamedTuple):
    """One field that is not at its default."""

    field: str
    value: Any
    default: Any  # REQUIRED where there is none


REQUIRED = "(required)"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} a second time", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper without aliases."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load_spec(source: str | Path, overrides: Mapping[str, Any] | None = None) -> RunSpec:
    """The spec at `source` (path or fsspec URL) with `overrides` (dotted path -> value) laid over.

    Raises:
        SpecError: no such file, not YAML, a key twice, or whatever `parse_spec` refuses.
    """
    raw = _parse_yaml(_read(source), str(source))
    if raw is None:
        raise SpecError(str(source), "an empty file", "a spec", "see `tip-ray init`")
    if overrides and isinstance(raw, dict):
        raw = apply_overrides(raw, overrides)
    return parse_spec(raw)


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """`["a.b=v", ...]` as {path: value}, each value read as YAML.

    Raises:
        SpecError: an assignment without `=` or path, or a value that is not YAML.
    """
    overrides: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise SpecError("--set", repr(assignment), "path=value", "e.g. selection.retention=0.2")
        overrides[path.strip()] = _parse_yaml(text, f"--set {path.strip()}")
    return overrides


def apply_overrides(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `raw` with each dotted path set; list items are named by index.

    `selection.rule=all` drops a retention that `raw` has, since that rule takes none.
    """
    result = copy.deepcopy(dict(raw))
    if overrides.get("selection.rule") == "all" and isinstance(result.get("selection"), dict):
        result["selection"].pop("retention", None)
    for path, value in overrides.items():
        _assign(result, path, value)
    return result


def dump_spec(spec: RunSpec, *, redact: bool = False) -> str:
    """YAML that `load_spec` reads back to an equal spec; `redact` blanks secrets in it."""
    data = spec.model_dump(mode="python")
    return yaml.dump(redacted(data) if redact else data, Dumper=_Dumper, sort_keys=False, width=100)


def redacted(value: Any, name: str = "") -> Any:
    """`value` with `***` for secrets: by the field's name, and passwords and signatures in URLs."""
    if isinstance(value, Mapping):
        return {key: redacted(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted(item, name) for item in value]
    if isinstance(value, str):
        if _SECRET_NAME.search(name):
            return _REDACTED
        value = _URL_PASSWORD.sub(rf"\1:{_REDACTED}@", value)
        return _URL_SIGNATURE.sub(rf"\1{_REDACTED}", value)
    return value


def differences(spec: RunSpec) -> list[Difference]:
    """Every field of `spec` that is required or differs from its default, in the spec's order."""
    return list(_differences(spec, ""))


def check_resume(old: RunSpec, new: RunSpec) -> None:
    """Raises SpecError, naming the fields, unless a run begun with `old` may go on with `new`.

    Secrets are not compared: `old` comes from a run directory, where they are blanked.
    """
    before, after = (dict(flat(redacted(one.model_dump()), "")) for one in (old, new))
    names = dict.fromkeys([*before, *after])
    changed = [
        name for name in names if before.get(name) != after.get(name) and not _may_differ(name)
    ]
    if changed:
        found = ", ".join(repr(after.get(name)) for name in changed)
        expected = ", ".join(repr(before.get(name)) for name in changed)
        cure = "start a new run with another --run-id, or undo the change"
        raise SpecError(", ".join(changed), found, f"{expected} as the run was begun", cure)


def _may_differ(path: str) -> bool:
    head, _, rest = path.partition(".")
    if head in POOLS:
        return rest.partition(".")[0] in RESUMABLE_OF_POOLS
    return head in RESUMABLE


def flat(value: Any, path: str) -> Iterable[tuple[str, Any]]:
    """(dotted path, leaf) of nested mappings; an empty mapping and a list are leaves."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from flat(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _differences(section: BaseModel, prefix: str) -> Iterable[Difference]:
    for name, field in type(section).model_fields.items():
        path, value = f"{prefix}{name}", getattr(section, name)
        default = _default(field)
        if isinstance(value, BaseModel) and default is not None:
            yield from _differences(value, f"{path}.")
        elif isinstance(value, tuple) and value and isinstance(value[0], BaseModel):
            for index, entry in enumerate(value):
                yield from _differences(entry, f"{path}.{index}.")
        elif value != default:
            plain = value.model_dump() if isinstance(value, BaseModel) else value
            yield Difference(path, redacted(plain, name), default)


def _default(field: FieldInfo) -> Any:
    return REQUIRED if field.is_required() else field.get_default(call_default_factory=True)


def _read(source: str | Path) -> str:
    name = str(source)
    try:
        what = f"{name}: cannot be read"
        with storage_errors(what, pass_absent=True), fsspec.open(name, "rb") as file:
            return str(file.read().decode())
    except FileNotFoundError:
        raise SpecError(name, "no such file", "a spec file", "see `tip-ray init`") from None
    except UnicodeDecodeError:
        raise SpecError(name, "bytes that are not UTF-8", "a YAML file") from None
    except ValueError as error:  # a URL of a file system that fsspec does not know
        raise SpecError(name, str(error), "a path or an fsspec URL") from None


def _parse_yaml(text: str, name: str) -> Any:
    """`text` as plain data; `name` stands in front of the line number of an error."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_explosion(node, name)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{name}:{mark.line + 1}" if mark else name
        problem = " ".join(str(error.problem or error.context).split())
        raise SpecError(line, problem, "YAML with each key once", "mend this line") from None
    except yaml.YAMLError as error:
        raise SpecError(name, " ".join(str(error).split()), "YAML text") from None
    except ValueError as error:  # a scalar such as a date that its tag cannot hold
        raise SpecError(name, str(error), "YAML values", "put the value in quotes") from None
    finally:
        loader.dispose()


def _refuse_explosion(root: yaml.Node, name: str) -> None:
    """Raises SpecError where aliases written out would be endless or more than MAX_NODES."""
    sizes: dict[int, int | None] = {}

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise SpecError(name, "an alias inside its own anchor", "finite YAML")
            return known
        sizes[id(node)] = None
        total = 1
        if isinstance(node, yaml.MappingNode):
            total += sum(size(key) + size(value) for key, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            total += sum(size(item) for item in node.value)
        sizes[id(node)] = total
        return total

    if size(root) > MAX_NODES:
        raise SpecError(name, "aliases that multiply", f"at most {MAX_NODES} values", "repeat less")


def _assign(root: dict[str, Any], path: str, value: Any) -> None:
    """Set `path` in nested mappings and lists, making the mappings that are missing."""
    place: Any = root
    names = path.split(".")
    for depth, name in enumerate(names[:-1]):
        inner = _step(place, name, path)
        if inner is None:
            inner = {}
            _put(place, name, inner)
        if not isinstance(inner, (dict, list)):
            here = ".".join(names[: depth + 1])
            raise SpecError(path, f"{here} = {inner!r}", f"{here} to have fields", "shorten it")
        place = inner
    _step(place, names[-1], path)
    _put(place, names[-1], value)


def _step(place: dict[str, Any] | list[Any], name: str, path: str) -> Any:
    if isinstance(place, dict):
        return place.get(name)
    if not name.isdecimal() or int(name) >= len(place):
        expected = f"an index below {len(place)}" if place else "a list with entries"
        raise SpecError(path, repr(name), expected)
    return place[int(name)]


def _put(place: dict[str, Any] | list[Any], name: str, value: Any) -> None:
    if isinstance(place, dict):
        place[name] = value
    else:
        place[int(name)] = value
