"""tip-ray: on-policy distillation of language models as a distributed service on Ray.

The public names load on first use, so that `import tip_ray` stays instant.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "RunClient": "tip_ray.service.client",
    "RunSpec": "tip_ray.contract.spec",
    "RunState": "tip_ray.contract.run_state",
    "RunStatus": "tip_ray.contract.run_state",
    "TipRayError": "tip_ray.contract.errors",
    "load_spec": "tip_ray.control.spec_file",
}
__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tip_ray' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
