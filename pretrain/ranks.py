"""What the ranks say to each other, in calls that all make alike: all fail together, and none is left waiting."""

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread

import torch
import torch.distributed as dist
from tqdm import tqdm


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all of them."""
    rank: int
    world: int
    device: torch.device
    talk: dist.ProcessGroup | None  # gloo, for what is on the CPU; None for a rank that is alone

    def agree(self, error: Exception | None, flag: bool = False) -> bool:
        """Whether the flag is up on any rank; where one has an error all raise it as a ValueError: none is left waiting."""
        if not self.talk:
            if error:
                raise error
            return flag
        raised = torch.tensor([error is not None, flag], dtype=torch.int32)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self.talk)
        if raised[0]:
            texts = self.gathered(str(error) if error else None)
            rank = next(rank for rank, text in enumerate(texts) if text)
            raise ValueError(f"rank {rank}: {texts[rank]}" if rank else texts[0]) from error
        return bool(raised[1])

    def gathered(self, mine) -> list:
        """Every rank's object, on every rank."""
        objects = [mine] * self.world
        if self.talk:
            dist.all_gather_object(objects, mine, group=self.talk)
        return objects

    def total(self, mine: dict[str, float]) -> dict[str, float]:
        """Sums over all ranks, by this rank's names; another may lack one."""
        parts = self.gathered(mine)
        return {name: sum(part.get(name, 0.0) for part in parts) for name in mine}

    def leave(self) -> None:
        """Without it a rank can abort while the others still talk to it."""
        if self.talk:
            dist.destroy_process_group()

    def say(self, text: str) -> None:
        """A decision and its reason, once for all ranks, without breaking the progress bar."""
        if self.rank == 0:
            tqdm.write(text, file=sys.stderr)

    def together(self, work: Callable[[], object]):
        """Work that may fail on one rank: then all fail."""
        done = error = None
        try:
            done = work()
        except (ValueError, OSError) as caught:
            error = caught
        self.agree(error)
        return done

    def first(self, work: Callable[[], object]):
        """Rank 0 works while the others wait; what it returns or raises reaches all."""
        done = [self.together(work) if self.rank == 0 else self.agree(None)]
        if self.talk:
            dist.broadcast_object_list(done, src=0, group=self.talk)
        return done[0]


def watch(hosts: dict[int, str], mine: int, timeout: float) -> None:
    """Beat for this host in the master's store, and end the process where another is silent.  For a thread of one rank a host."""
    silence, last, silent = 0.8 * timeout, {rank: (0, time.monotonic()) for rank in hosts}, []

    def beat() -> None:  # in a thread of its own: where a link is cut the store's answer never comes
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        while True:  # beats are counted, and timed by the clock of whoever looks: hosts' clocks may differ
            with suppress(dist.DistError):
                for rank in hosts:
                    count = store.add(f"heartbeat {rank}", int(rank == mine))
                    last[rank] = last[rank] if last[rank][0] == count else (count, time.monotonic())
            time.sleep(timeout / 10)
    Thread(target=beat, daemon=True).start()
    while not silent:
        time.sleep(timeout / 10)
        silent = [host for rank, host in hosts.items() if time.monotonic() - last[rank][1] > silence]
    whose = f"the master {hosts[0]}" if hosts[0] in silent else ", ".join(silent)
    with suppress(OSError):  # where ssh is gone too
        print(f"error: host {hosts[mine]} has not heard of {whose} for {silence:.0f} s; the same command goes on from the last "
              "checkpoint, also on the hosts that are left", file=sys.stderr, flush=True)
    os._exit(1)
