"""The cache of the status API: one value a stamp, made once, within a bound on memory."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tip_ray.contract.errors import NotFoundError, RunDirectoryError
from tip_ray.service import api_cache
from tip_ray.service.api_cache import Cache

MANY = 1 << 30


class Maker:
    """Makes 1, 2, 3, ..."""

    def __init__(self) -> None:
        self.made = 0
        self.known: list[int | None] = []

    def __call__(self, known: int | None) -> int:
        self.known.append(known)
        self.made += 1
        return self.made


def test_a_value_is_made_once_for_a_stamp_and_from_the_one_before() -> None:
    cache, make = Cache(MANY), Maker()
    values = [cache.get("a", stamp, make, lambda _: 1) for stamp in ("x", "x", "y", "y", "x")]
    assert values == [1, 1, 2, 2, 3]
    assert make.known == [None, 1, 2]
    assert cache.get("b", "x", make, lambda _: 1) == 4


def test_threads_wait_for_the_one_that_makes_it() -> None:
    cache, begun, made = Cache(MANY), threading.Event(), []

    def make(_: int | None) -> int:
        begun.wait(10)
        made.append(1)
        return 7

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(cache.get, "a", "x", make, lambda _: 1) for _ in range(8)]
        begun.set()
        assert [future.result() for future in futures] == [7] * 8
    assert made == [1]


def test_who_waited_for_a_newer_value_does_not_make_an_older_one_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, make, now = Cache(MANY), Maker(), [1.0]
    monkeypatch.setattr(api_cache.time, "monotonic", lambda: now[0])
    values = []
    for asked_at, stamp in ((1.0, "x"), (5.0, "y"), (3.0, "x"), (6.0, "x")):
        now[0] = asked_at  # the third asked before the second was made, and waited for it
        values.append(cache.get("a", stamp, make, lambda _: 1))
    assert values == [1, 2, 2, 3]


def test_a_broken_file_is_read_again_when_it_has_changed_and_an_absent_one_always() -> None:
    cache, tries = Cache(MANY), []

    def broken(_: int | None) -> int:
        tries.append("broken")
        raise RunDirectoryError("a: broken")

    def absent(_: int | None) -> int:
        tries.append("absent")
        raise NotFoundError("b: absent")

    for stamp in ("x", "x", "y"):
        with pytest.raises(RunDirectoryError, match="a: broken"):
            cache.get("a", stamp, broken, lambda _: 1)
        with pytest.raises(NotFoundError):
            cache.get("b", stamp, absent, lambda _: 1)
    assert (tries.count("broken"), tries.count("absent")) == (2, 3)
    assert cache.get("a", "z", lambda _: 5, lambda _: 1) == 5


def test_what_was_used_longest_ago_goes_first() -> None:
    cache = Cache(40_000)
    for key in range(3):
        cache.put(key, "x", key, 10_000)
    assert cache.get(0, "x", lambda _: pytest.fail("made again"), lambda _: 1) == 0
    cache.put(3, "x", 3, 10_000)
    assert [cache.peek(key, "x") for key in range(4)] == [0, None, 2, 3]
    cache.put(4, "x", 4, 100_000)  # never kept
    assert [cache.peek(key, "x") for key in range(5)] == [None] * 5
    cache.put(5, "x", 5, 10_000)
    assert (cache.peek(5, "x"), cache.peek(5, "y")) == (5, None)
