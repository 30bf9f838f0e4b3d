"""The same pieces of work as tasks of a Ray cluster, which the extra ``ray`` brings.

The machines have to see the same files under the same names, and the same mlseg.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from mlseg.errors import UserError, one_line
from mlseg.workers.pool import Died, Ended, Raised, Resources, Returned
from mlseg.workers.sharing import STOPPED

LOCAL = "local"
_PASSED_ON = ("MLSEG_DATA", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables of the environment that the work depends on."""


class Cluster:
    """A :class:`mlseg.workers.Pool` of Ray's workers.

    Args:
        address: of a running cluster (``auto``, ``ray://HOST:10001``), or ``local``: one of this
            machine, which ends with it.
        fresh: whether each piece of work has a process of its own.
        what: the command, for messages.

    Raises:
        UserError: Ray isn't installed, or there is no such cluster.
    """

    def __init__(self, address: str, *, fresh: bool, what: str) -> None:
        if importlib.util.find_spec("ray") is None:
            raise UserError(
                f"{what} --ray needs ray; install it: uv pip install ray (or in the checkout: "
                "uv pip install '.[ray]')"
            )
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody was asked
        import ray

        passed = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
        try:
            ray.init(
                address="local" if address == LOCAL else address,
                runtime_env={"env_vars": passed},
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=False if address == LOCAL else None,
            )
        except Exception as error:  # whatever it raises, by address and version
            raise UserError(
                f"--ray {address}: {one_line(error)}; give the address of a running cluster, or "
                "local"
            ) from error
        self._ray: Any = ray
        self._task = ray.remote(max_calls=1 if fresh else 0, max_retries=0)(_at)
        self._at_work: dict[Any, Hashable] = {}
        self._cancelled: set[Any] = set()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for reference in self._at_work:
            self._ray.cancel(reference, force=True)
        self._ray.shutdown()

    def room(self) -> int:
        """One more than there are CPUs, so that a cluster that can grow is asked to."""
        return int(self._ray.cluster_resources().get("CPU", 1)) + 1 - len(self._at_work)

    def start(
        self,
        key: Hashable,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        needs: Resources,
    ) -> None:
        """Hand it to Ray with what it needs of a machine."""
        asked: dict[str, Any] = {"num_cpus": needs.get("cpus", 1)}
        if "gpus" in needs:
            asked["num_gpus"] = needs["gpus"]
        if "memory_gib" in needs:
            asked["memory"] = int(needs["memory_gib"] * 2**30)
        reference = self._task.options(**asked).remote(os.getcwd(), function, tuple(arguments))
        self._at_work[reference] = key

    def wait(self, seconds: float) -> list[tuple[Hashable, Ended]]:
        """What has ended."""
        if not self._at_work:
            return []
        ready, _ = self._ray.wait(list(self._at_work), timeout=seconds)
        return [(self._at_work.pop(reference), self._result(reference)) for reference in ready]

    def interrupt(self) -> None:
        """Cancel what is at work: Ray's way to send Ctrl-C."""
        for reference in self._at_work:
            if reference not in self._cancelled:
                self._cancelled.add(reference)
                self._ray.cancel(reference, force=False)

    def _result(self, reference: Any) -> Ended:
        errors = self._ray.exceptions
        try:
            return Returned(self._ray.get(reference))
        except errors.TaskCancelledError:
            return Returned(STOPPED)
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError) as error:
            return Died(f"its process ended: {one_line(error)}")
        except errors.RayTaskError as error:
            cause = error.cause if error.cause is not None else error
            return Raised(f"{type(cause).__name__}: {one_line(cause)}", str(error))
        except errors.RayError as error:
            return Died(one_line(error))


def _at(place: str, function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    """Call it in the folder in which the caller is."""
    os.chdir(place)
    return function(*arguments)
