"""What `from tip_ray import ...` offers; a change here is a change of the interface."""

from __future__ import annotations

import pytest

import tip_ray

PUBLIC = {"RunClient", "RunSpec", "RunState", "RunStatus", "TipRayError", "load_spec"}


def test_public_names_are_pinned_and_load() -> None:
    assert set(tip_ray.__all__) == PUBLIC
    assert set(dir(tip_ray)) >= PUBLIC
    for name in PUBLIC:
        assert getattr(tip_ray, name).__name__ == name


def test_other_names_do_not_exist() -> None:
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = tip_ray.absent
