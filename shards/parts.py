"""Parts of a build: processes that share its work through files, on any machines of one file system.

Ranks that a launcher started (RANK, WORLD_SIZE) wait for one another; parts that a person runs (`--part K/N`) never wait.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

BEAT, POLL, LOST = 5.0, 1.0, 60.0  # seconds: between signs of life, between looks, without a sign until a part is gone


class Unfinished(Exception):
    """A part by hand has done what can be done now; the text says what is missing."""


@dataclass(frozen=True)
class Part:
    """One process's share of a build; 1 of 1 is a whole build."""

    number: int  # from 1
    of: int
    waits: bool  # for the others: a launcher started them all
    store: Path

    @staticmethod
    def given(text: str | None, store: Path) -> "Part":
        """From `--part`, or without it from the launcher's variables."""
        rank = f"{int(os.environ.get('RANK', 0)) + 1}/{os.environ.get('WORLD_SIZE', 1)}"
        number, _, of = (text or rank).partition("/")
        if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
            raise ValueError(f"--part {text or rank}: write K/N, the K-th of N parts, such as 1/2")
        return Part(int(number), int(of), text is None, store)

    @property
    def leads(self) -> bool:
        """Does what one part does for all: the first rank, or by hand whoever comes there."""
        return self.number == 1 or not self.waits

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the store, whole or as one part.  The part's own file grows while it lives and ends with its error."""
        with open(self.store / "lock", "ab") as lock, open(self.store / f"part-{self.number}", "ab", 0) as mine:
            try:
                fcntl.flock(lock, (fcntl.LOCK_EX if self.of == 1 else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"--out {self.store.parent}: another build is writing there; wait, or give another") from None
            mine.truncate(0)
            ended = Event()

            def beat() -> None:
                while not ended.wait(BEAT):
                    mine.write(b".")

            Thread(target=beat, daemon=True).start()
            try:
                yield
            except BaseException as error:
                mine.write((str(error) or "stopped").encode())
                raise
            finally:
                ended.set()

    def share(self, tasks: Iterable[tuple], files: list[Path]) -> Iterator[tuple]:
        """This part's tasks: every N-th whose file is not there yet.  A task begins with its file; `files` gains all."""
        for number, task in enumerate(tasks):
            files.append(task[0])
            if number % self.of + 1 == self.number and not task[0].exists():
                yield task

    def join(self, what: str, files: list[Path], make: Callable[[], None], result: Path) -> None:
        """Return when `result` is there, which the part that leads makes of all files."""
        if not self.leads:
            return self.wait(f"the joined {what}", [result])
        with open(self.store / "joining", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two parts by hand may come here at once
            if not result.exists():
                self.wait(what, files)
                make()

    def wait(self, what: str, files: list[Path]) -> None:
        """Return when all files are there.  Unfinished for a part by hand; ValueError where another failed or is gone."""
        seen = {}  # by part: what its file held, and since when, by this machine's clock
        while others := sorted({number % self.of + 1 for number, file in enumerate(files) if not file.exists()}):
            if not self.waits:
                raise Unfinished(f"{what} of others are missing: run --part {others[0]}/{self.of} next")
            if not seen:
                print(f"part {self.number}/{self.of}: waits for {what} of part {others}", flush=True)
            for other in others:
                file, now = self.store / f"part-{other}", time.monotonic()
                sign = file.read_bytes() if file.exists() else b""  # read: a network file system then asks its server
                before, since = seen.setdefault(other, (sign, now))
                words = sign.strip(b".").decode()  # of an earlier start perhaps, as long as nothing changes
                if sign != before and words:
                    raise ValueError(f"part {other}/{self.of} failed: {words}")
                if sign == before and now - since > LOST:
                    raise ValueError(f"part {other}/{self.of} is gone: no sign of it for {LOST:g} s; start all again {words}")
                seen[other] = sign, since if sign == before else now
            time.sleep(POLL)
