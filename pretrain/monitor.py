"""What a person sees of a run: run.json, metrics.jsonl, TensorBoard, the progress bar."""

import json
import sys
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from pretrain.ranks import Ranks
from shards.block import write, write_json


def _tag(name: str) -> str:
    """TensorBoard orders its groups by name: what tells whether a run is healthy comes first."""
    health = name.endswith(("loss", "grad_norm", "lr", "/s", "data_wait", "memory_GB"))
    return f"{'1 health' if health else '3 held-out rows' if name.startswith('held_out') else '2 terms'}/{name}"


class Monitor:
    """Figures of logged steps, each once: a run that goes on from step `first` drops later ones.  For rank 0."""

    def __init__(self, out: Path, *, first: int, steps: int, about: dict):
        self.lines = out / "metrics.jsonl"
        lines = self.lines.read_text().splitlines(keepends=True) if first and self.lines.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= first]  # a kill can halve one
        write(self.lines, "".join(kept).encode())
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=first + 1 if first else 0)
        write_json(out / "run.json", about)
        self.board.add_text("settings", f"```\n{json.dumps(about, indent=2)}\n```")
        for summary in hparams({key: str(value) for key, value in about["settings"].items()}, {_tag("loss"): 0}):
            self.board.file_writer.add_summary(summary)  # SummaryWriter.add_hparams would make a run of its own
        self.bar = tqdm(total=steps, initial=first, unit="step", desc="distil", dynamic_ncols=True, file=sys.stderr,
                        mininterval=1.0, delay=0.1)  # the start-up lines stand before it

    def log(self, step: int, figures: dict[str, float]) -> None:
        """One line of figures after `step` updates, if there are any; the same as TensorBoard scalars; the bar moves."""
        self.bar.update(step - self.bar.n)
        if not figures:
            return
        with open(self.lines, "a") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        for name, value in figures.items():
            self.board.add_scalar(_tag(name), value, step)
        self.board.flush()
        if "rows/s" in figures:
            shown = {name: f"{figures[name]:.4g}" for name in ("loss", "rows/s", "tokens/s") if name in figures}
            self.bar.set_postfix(shown, refresh=False)

    def show(self, step: int, pictures: dict[str, Tensor]) -> None:
        """Pictures (height, width) of values from 0 to 1; small ones in large pixels."""
        for name, picture_YX in pictures.items():
            large = torch.ones([max(1, 256 // len(picture_YX))] * 2)
            self.board.add_image(f"3 held-out rows/{name}", picture_YX.cpu().kron(large), step, dataformats="HW")

    def close(self) -> None:
        self.bar.close()
        self.board.close()


class Window:
    """Figures by row since the last logged step: sums on the device until they are asked for; and what the steps took."""

    def __init__(self):
        self.sums, self.rows, self.tokens = {}, 0, 0
        self.begin, self.waited = time.perf_counter(), 0.0

    def add(self, figures: dict[str, Tensor]) -> None:
        """Values (R,) of some rows."""
        for name, value_R in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value_R.detach().double().sum()

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Over the rows of all ranks."""
        total = ranks.total({name: float(value) for name, value in {**self.sums, "rows": self.rows}.items()})
        rows = total.pop("rows")
        return {name: value / rows for name, value in total.items()}

    def rates(self, ranks: Ranks) -> dict[str, float]:
        """Over all ranks; data_wait is the share of time spent waiting for rows, memory a rank's peak."""
        seconds, gpu = time.perf_counter() - self.begin, ranks.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() if gpu else getrusage(RUSAGE_SELF).ru_maxrss * 1024
        return dict(ranks.total({"rows/s": self.rows / seconds, "tokens/s": self.tokens / seconds,
                                 "data_wait": self.waited / seconds / ranks.world, "memory_GB": memory / 1e9 / ranks.world}))
