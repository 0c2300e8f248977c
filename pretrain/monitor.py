"""What a person sees of a run: run.json, metrics.jsonl, TensorBoard with pictures in which dark is much, the progress bar."""

import json
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from pretrain.objective import Trace
from pretrain.ranks import Ranks
from shards.block import write, write_json

HEADS = 4  # whose attention is shown
TOKENS = 1024  # on which layers are compared


def _tag(name: str) -> str:
    """TensorBoard orders its groups by name: what tells whether a run is healthy comes first."""
    health = name.endswith(("loss", "grad_norm", "lr", "/s", "data_wait", "memory_GB", "matrix_rate")) or name.startswith("time")
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
        self.bar = tqdm(total=steps, initial=first, unit="step", desc="distil", dynamic_ncols=True, delay=0.1)  # start-up is said

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


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of this rank in a product of large matrices, the best of three."""
    n = 4096 if device.type == "cuda" else 1024
    timer = Timer("a @ a", globals={"a": torch.ones(n, n, dtype=dtype, device=device)}, num_threads=torch.get_num_threads())
    return 2 * n**3 / min(timer.timeit(5).median for _ in range(3))


class Window:
    """Figures by row since the last logged step: sums on the device until they are asked for; and what the steps took."""

    def __init__(self):
        self.sums, self.rows, self.tokens = {}, 0, 0
        self.begin, self.waited, self.laps = time.perf_counter(), 0.0, []

    def lap(self, part: str) -> None:
        """What was computed since the last lap is this part's; a GPU notes the time when it comes there, and nothing waits."""
        mark = time.perf_counter()
        if torch.cuda.is_initialized():
            (mark := torch.cuda.Event(enable_timing=True)).record()
        self.laps.append((part, mark))

    def add(self, figures: dict[str, Tensor]) -> None:
        """Values (R,) of some rows."""
        for name, value_R in figures.items():
            self.sums[name] = self.sums.get(name, 0.0) + value_R.detach().double().sum()

    def means(self, ranks: Ranks) -> dict[str, float]:
        """Over the rows of all ranks."""
        total = ranks.total({name: float(value) for name, value in {**self.sums, "rows": self.rows}.items()})
        rows = total.pop("rows")
        return {name: value / rows for name, value in total.items()}

    def rates(self, ranks: Ranks, operations: float) -> dict[str, float]:
        """Over all ranks; shares of the time by part, a rank's peak memory, its `operations` a token beside its matrix rate."""
        gpu = ranks.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated() if gpu else getrusage(RUSAGE_SELF).ru_maxrss * 1024
        torch.cuda.synchronize() if gpu else None
        seconds, spent = time.perf_counter() - self.begin, Counter(data_wait=self.waited, matrix_rate=operations * self.tokens)
        for (_, begin), (part, end) in pairwise(self.laps):
            spent[f"time/{part}"] += end - begin if isinstance(end, float) else begin.elapsed_time(end) / 1000
        del spent["time/"]
        shares = {name: taken / ranks.world for name, taken in spent.items()} | {"rows/s": self.rows, "tokens/s": self.tokens}
        return ranks.total({name: value / seconds for name, value in shares.items()} | {"memory_GB": memory / 1e9 / ranks.world})


def attention(student: Trace, teacher: Trace, real_BL: Tensor, layers: list) -> Tensor:
    """The first row's attention: a line for each student layer, in it for each head the teacher's, then the student's."""
    def maps(x: Trace, layer: int | Tensor) -> Tensor:
        q, k = (part[layer - 1][0, :HEADS, real_BL[0]].float() for part in (x.queries, x.keys))
        p_HLL = (q @ k.mT * q.shape[-1]**-0.5).softmax(-1).sqrt()  # the root shows small ones too
        return nn.functional.pad(p_HLL / p_HLL.amax((1, 2), keepdim=True), (0, 1, 0, 1), value=1.0)
    pairs = [(maps(teacher, torch.tensor(n).max()), maps(student, m)) for m, n in enumerate(layers, start=1) if n != ()]
    return 1 - torch.cat([torch.cat([one for heads in zip(*pair) for one in heads], 1) for pair in pairs])


def similarity(student: Trace, teacher: Trace, real_BL: Tensor) -> Tensor:
    """Linear CKA (arXiv 1905.00414) of every student layer (down) with every teacher layer, the embeddings first."""
    s_states, t_states = ([x[real_BL][:TOKENS].float() for x in traced.hidden] for traced in (student, teacher))
    s_states, t_states = ([x - x.mean(0) for x in states] for states in (s_states, t_states))
    s_norms, t_norms = ([(x.mT @ x).norm() for x in states] for states in (s_states, t_states))
    pairs = [(x.mT @ y).norm()**2 / (a * b) for x, a in zip(s_states, s_norms) for y, b in zip(t_states, t_norms)]
    return 1 - torch.stack(pairs).unflatten(0, (len(s_states), -1))
