"""A request to stop: SIGTERM, SIGINT or SIGUSR1 to any one rank, or DeepSpeed's launcher gone."""

import os
import signal
from pathlib import Path

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Before `armed` there is nothing to save: a signal ends the process at once.  A second SIGINT always does."""

    def __init__(self):
        self.armed, self.reason = False, None
        self.launchers = _launchers()
        for number in SIGNALS:
            signal.signal(number, self._take)

    def done(self) -> None:
        """The exit code stands: no later signal may change it, while Python ends, to that of a killed process."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _take(self, number: int, _frame) -> None:
        name = signal.Signals(number).name
        if not self.armed:
            os._exit(PREEMPTED)
        if name == self.reason == "SIGINT":  # SIGTERM comes twice by itself: to the process group, and passed on by launchers
            os._exit(128 + signal.SIGINT)
        self.reason = name

    def asked(self) -> bool:
        """Whether this rank was asked to stop; it looks after the launcher, which orphans its ranks where it is killed."""
        if self.reason is None and _launchers() != self.launchers:
            self.reason = "the launcher is gone"
        return self.reason is not None


def _launchers() -> tuple[int, int] | None:
    """Process ids of DeepSpeed's launch.py, this rank's parent, and of `deepspeed`, its parent; None where there is none."""
    try:
        parent = Path("/proc", str(os.getppid()))
        if b"deepspeed.launcher.launch" in (parent / "cmdline").read_bytes():
            return os.getppid(), int((parent / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it went in this moment, or this is no Linux
        return None
