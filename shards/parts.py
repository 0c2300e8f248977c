"""Parts of a build: processes that share its work through files, on any machines of one file system.

Ranks that a launcher started (RANK, WORLD_SIZE) wait for one another; parts that a person runs (`--part K/N`) never wait.
"""

import fcntl
import os
import time
from collections.abc import Iterator
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
        """May join the pieces and write the manifest: the first rank, or by hand whoever finds all there."""
        return self.number == 1 or not self.waits

    def makes(self, number: int, path: Path) -> bool:
        """Whether a file is this part's to make: every N-th, where it is not there yet."""
        return number % self.of + 1 == self.number and not path.exists()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lock the store, whole or as one part, but not for workers: a killed build's is free at once.

        The part's own file grows while it lives and ends with its error.
        """
        with open(self.store / "lock", "ab") as lock, open(self.store / f"part-{self.number}", "ab", 0) as mine:
            try:
                fcntl.flock(lock, (fcntl.LOCK_EX if self.of == 1 else fcntl.LOCK_SH) | fcntl.LOCK_NB)
                fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"--out {self.store.parent}: another build is writing there; wait, or give another") from None
            mine.truncate(0)
            ended = Event()
            Thread(target=_beat, args=(mine, ended), daemon=True).start()
            try:
                yield
            except BaseException as error:
                mine.write((str(error) or "stopped").encode())
                raise
            finally:
                ended.set()

    def wait(self, what: str, paths: list[Path]) -> None:
        """Return when all files are there.  Unfinished for a part by hand; ValueError where another failed or is gone."""
        seen = {}  # by part: what its file held, and since when, by this machine's clock
        left = list(enumerate(paths))
        while left := [(number, path) for number, path in left if not path.exists()]:
            others = sorted({number % self.of + 1 for number, _ in left})
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


def _beat(file, ended: Event) -> None:
    while not ended.wait(BEAT):
        file.write(b".")
