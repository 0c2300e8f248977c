"""What a person sees of a run: metrics.jsonl, TensorBoard, the progress bar.

Rank 0 alone has a Monitor; every rank has a Window, whose figures are those of all ranks.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pretrain.engine import Ranks
from shards.block import written_whole


class Monitor:
    """Figures of logged steps, each step once, also after a resume.

    A run goes on from a checkpoint's step, or from 0: later lines of metrics.jsonl are dropped, and TensorBoard is
    told to forget the steps after it.
    """

    def __init__(self, out: Path, *, first: int, steps: int):
        self.lines = out / "metrics.jsonl"
        kept = [line for line in self._read() if first and json.loads(line)["step"] <= first]
        with written_whole(self.lines) as file:
            file.write("".join(kept).encode())
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=first + 1 if first else 0)
        self.bar = tqdm(total=steps, initial=first, unit="step", desc="distil", dynamic_ncols=True, file=sys.stderr,
                        mininterval=1.0, delay=0.1)  # the start-up lines stand before it

    def _read(self) -> list[str]:
        """Whole lines only: a killed run can leave half a one."""
        if not self.lines.exists():
            return []
        return [line for line in self.lines.read_text().splitlines(keepends=True) if line.endswith("\n")]

    def log(self, step: int, figures: dict[str, float]) -> None:
        """One line of figures after `step` updates; the same ones as TensorBoard scalars under their names."""
        with open(self.lines, "a") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        for name, value in figures.items():
            self.board.add_scalar(name if "/" in name else f"run/{name}", value, step)
        self.board.flush()
        shown = {name: f"{figures[name]:.4g}" for name in ("loss", "rows/s", "tokens/s") if name in figures}
        if shown:
            self.bar.set_postfix(shown, refresh=False)

    def advance(self, step: int) -> None:
        self.bar.update(step - self.bar.n)

    def text(self, name: str, content: str) -> None:
        self.board.add_text(name, content, 0)

    def close(self) -> None:
        self.bar.close()
        self.board.close()


def say(rank: int, text: str) -> None:
    """A decision and its reason, once for all ranks, without breaking the progress bar."""
    if rank == 0:
        tqdm.write(text, file=sys.stderr)


class Window:
    """Figures of the steps since the last logged one, summed on the device and fetched once."""

    def __init__(self, ranks: Ranks):
        self.ranks, self.sums = ranks, {}
        self.begin, self.waited = time.perf_counter(), 0.0
        self.rows = self.tokens = self.steps = 0

    def add(self, student: str, terms: dict[str, Tensor], loss: Tensor, micro_batches: int) -> None:
        values = torch.stack([v.detach().mean() for v in terms.values()] + [loss.detach()]).double() / micro_batches
        names, before = self.sums.get(student, ((*terms, "loss"), 0.0))
        self.sums[student] = (names, before + values)

    def means(self, named) -> dict[str, float]:
        """Every student's loss and terms, rates over all ranks, and the share of time spent waiting for rows."""
        seconds = time.perf_counter() - self.begin
        parts = [values / (self.steps * self.ranks.world) for _, values in self.sums.values()]
        count = torch.tensor([self.rows, self.tokens, self.waited / seconds / self.ranks.world], dtype=torch.float64)
        together = torch.cat([*parts, count.to(self.ranks.device)])
        dist.all_reduce(together)
        fetched = iter(together.tolist())
        figures = {named(student, name): next(fetched) for student, (names, _) in self.sums.items() for name in names}
        rows, tokens, waited = fetched
        return figures | {"rows/s": rows / seconds, "tokens/s": tokens / seconds, "data_wait": waited}
