"""SIGINT, SIGTERM and SIGHUP as a request that the loop answers between two iterations."""

import signal
import threading
from types import FrameType
from typing import Any

from mlseg import parallel


class Interrupted(Exception):
    """The run was asked to stop and has saved its state.

    Attributes:
        exit_code: 128 plus the signal's number, as shells have it: 130, 143 or 129.
    """

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"{signal.Signals(number).name}: stopped and saved after step {step}")
        self.exit_code = 128 + number


class Interruption:
    """Context in which the first of these signals is noted; a second one acts at once.

    SIGHUP is that the terminal was closed; a run under ``nohup``, which ignores it, goes on.
    Signals reach a process's main thread only: in any other thread this does nothing. A signal to
    one of several processes stops them all, at the same step.
    """

    SIGNALS = tuple(
        getattr(signal, name)
        for name in ("SIGINT", "SIGTERM", "SIGHUP")  # the last is not everywhere
        if hasattr(signal, name)
    )

    def __init__(self) -> None:
        self.number: int | None = None
        self._former: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come to this process."""
        return self.number is not None

    def agreed(self) -> bool:
        """Whether one has come, of several processes to any by the end of the step before.

        To be asked once after each step.
        """
        if not parallel.several():
            return self.requested
        return self._agreed(parallel.most(self.number or 0))

    def agreed_at_last(self) -> bool:
        """Whether one has come to any of several processes in the last step of all."""
        return self._agreed(parallel.end_of_questions())

    def _agreed(self, number: int) -> bool:
        if number > 0:
            parallel.end_of_questions()  # the next run of these processes is asked anew
        self.number = number or self.number
        return number > 0

    def exception(self, step: int) -> Interrupted:
        """What to raise once the state is saved."""
        assert self.number is not None
        return Interrupted(self.number, step)

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                if signal.Signals(number).name == "SIGHUP" and (
                    signal.getsignal(number) is signal.SIG_IGN
                ):
                    continue  # shells ignore SIGINT for what they start behind them; nohup means it
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._give_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._give_back()

    def _give_back(self) -> None:
        while self._former:
            number, handler = self._former.popitem()
            signal.signal(number, handler)
