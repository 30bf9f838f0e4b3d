"""Several processes as torchrun starts them, without its agent; none outlives the test."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch.distributed as dist
from children import Child

from mlseg import run
from mlseg.engines.engine import Engine


class Several:
    """``count`` processes of a command; use it as a context, at whose end all have ended.

    Args:
        arguments: of the command.
        folder: where each writes its standard error.
        pause: seconds that an iteration takes longer.
    """

    def __init__(
        self,
        count: int,
        arguments: list[str],
        folder: Path,
        command: Callable[[list[str]], int] = run.main,
        pause: float = 0.0,
    ) -> None:
        # As the agent does: the store outlives whichever process ends first.
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, None, True, timedelta(minutes=5), wait_for_workers=False
        )
        folder.mkdir(parents=True, exist_ok=True)
        self.ranks = [
            Child(
                arguments,
                folder / f"stderr{rank}",
                partial(_join, rank, count, self._store.port, pause),
                command,
            )
            for rank in range(count)
        ]

    def __enter__(self) -> "Several":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for child in self.ranks:
            child.kill()
            child.wait()

    def wait(self) -> list[int]:
        """Their exit codes, negative for signals."""
        return [child.wait() for child in self.ranks]

    def said(self) -> list[str]:
        """All that they wrote."""
        return [line for child in self.ranks for line in child.lines()]

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that they do."""
        limit = time.monotonic() + 120
        while not condition():
            assert all(child.poll() is None for child in self.ranks), self.said()
            assert time.monotonic() < limit, self.said()
            time.sleep(0.05)


def _join(rank: int, count: int, port: int, pause: float) -> None:
    """What torchrun sets in the environment."""
    os.environ.update(
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
    )
    if pause:
        former = Engine.train_step

        def slow(self: Engine) -> None:
            time.sleep(pause)
            former(self)

        Engine.train_step = slow  # type: ignore[method-assign]
