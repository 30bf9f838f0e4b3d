"""Pieces of work in processes: what comes back, in which order, and what of those that die."""

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import children
import jobs
import pytest
from waiting_for import alive, wait_until

from mlseg.errors import UserError
from mlseg.workers import Died, Here, Processes, Raised, Returned, Tally, Work, shard, work_off


def all_of(pool: Any, number: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    while len(found) < number:
        found.update(pool.wait(1.0))
    return found


def work(
    key: str, function: Callable[..., Any], argument: Any = 0, after: Sequence[str] = ()
) -> Work[str]:
    return Work(key, function, lambda: [argument], done=lambda: False, after=after)


def do(pieces: Sequence[Work[str]], pool: Any, **more: Any) -> tuple[Tally[str], list[str]]:
    told: list[str] = []
    with pool:
        tally = work_off(
            pieces,
            pool,
            told=lambda tally, key, ended: told.append(key),
            stop=more.pop("stop", lambda: False),
            **more,
        )
    return tally, told


@pytest.mark.parametrize("fresh", [True, False])
def test_what_comes_back(fresh: bool) -> None:
    with Processes(2, fresh=fresh) as pool:
        assert pool.room() == 2
        pool.start("a", jobs.square, [3], {})
        pool.start("b", jobs.fail, [0], {})
        assert pool.room() == 0
        found = all_of(pool, 2)
        assert found["a"] == Returned(9)
        assert isinstance(found["b"], Raised)
        assert found["b"].text == "ValueError: no such number"
        assert "jobs.py" in found["b"].traceback
        pool.start("c", jobs.die, [0], {})
        assert all_of(pool, 1)["c"] == Died("its process was ended by SIGKILL (out of memory?)")
        pids = set()
        for key in range(3):
            pool.start(key, jobs.pid, [0], {})
            pids.add(all_of(pool, 1)[key].value)
        assert len(pids) == (3 if fresh else 1)
        assert os.getpid() not in pids


def test_in_order_of_need() -> None:
    pieces = [work("c", jobs.square, 2, after=["b"]), work("b", jobs.square, 3, after=["a"])]
    tally, told = do([*pieces, work("a", jobs.square, 4)], Here())
    assert told == ["a", "b", "c"]
    assert tally.done == {"a": 16, "b": 9, "c": 4}


def test_what_builds_on_a_failure_is_left_out() -> None:
    pieces = [work("b", jobs.square, after=["a"]), work("a", jobs.refuse), work("c", jobs.square)]
    tally, _told = do(pieces, Here())
    assert tally.failed == {
        "a": "it can't be done",
        "b": "left out: what it builds on, a, has failed",
    }
    assert list(tally.done) == ["c"]
    tally, _ = do(pieces, Here(), strict=True)
    assert "c" not in tally.done


def test_what_died_is_taken_up_again_once(tmp_path: Path) -> None:
    pieces = [work("once", jobs.die_once, str(tmp_path / "x")), work("always", jobs.die)]
    tally, _ = do(pieces, Processes(1, fresh=True), retries=1)
    assert tally.done == {"once": "done"}
    assert tally.failed == {"always": "its process was ended by SIGKILL (out of memory?)"}


def test_what_is_held_comes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlseg.workers.sharing._RETRY", 0.2)
    pieces = [work("held", jobs.held_once, str(tmp_path / "x")), work("free", jobs.square)]
    _, told = do(pieces, Here())
    assert told == ["free", "held"]


def test_a_stop_leaves_the_rest() -> None:
    done: list[str] = []

    def stop() -> bool:
        return len(done) == 1

    pieces = [
        Work(key, done.append, lambda key=key: [key], done=lambda: False)  # type: ignore[misc]
        for key in "ab"
    ]
    tally, _ = do(pieces, Here(), stop=stop)
    assert done == ["a"]
    assert tally.waiting == ["b"]


def test_shards_are_a_partition() -> None:
    keys = list(range(10))
    parts = [shard(keys, f"{i}/3") for i in range(3)]
    assert sorted(key for part in parts for key in part) == keys
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for wrong in ("3/3", "-1/3", "1", "a/b", "1/0"):
        with pytest.raises(UserError, match="--shard"):
            shard(keys, wrong)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["busy", "idle"])
def test_processes_end_with_a_killed_parent(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "pid"
    parent = children.Child([str(place), kind], tmp_path / "said", command=jobs.start_and_wait)
    pid = int(wait_until(lambda: place.exists() and place.read_text()))
    assert alive(pid)
    parent.kill()
    parent.wait()
    wait_until(lambda: not alive(pid))


class TestRay:
    def test_without_ray(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from mlseg.workers import on_ray

        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UserError, match="mlseg sweep --ray needs ray; install it"):
            on_ray.Cluster("local", fresh=True, what="mlseg sweep")
