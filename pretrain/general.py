"""The command line of general distillation, started by launch/general.sh, and what asks a run to stop."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from pretrain.recipe import SHAPES, Recipe

PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """SIGTERM, SIGINT or SIGUSR1 to any one rank, or DeepSpeed's launcher gone.  Before `armed` there is nothing to save: then a
    signal ends the process at once.  A second SIGINT always does."""

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


def options(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; reading it imports no torch."""
    parser = argparse.ArgumentParser(prog="deepspeed launch/general.sh", formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                                     description="Distil a small BERT from a big one: its states and attention scores.",
                                     epilog="key=value settings: " + ", ".join(vars(Recipe())) + " (see pretrain/recipe.py)")
    parser.add_argument("--shards", action="append", help="of shards.build: a folder, http(s)://HOST/FOLDER, 'pipe:COMMAND {}' "
                        "({}: a file's name); several, one after the other: steps=9000,1000; default: data/shards")
    parser.add_argument("--teacher", default="bert-base-uncased", help="model folder or hub name")
    parser.add_argument("--student", action="append", help=f"{', '.join(SHAPES)}, or NAME:layers=3,hidden=288; may be "
                        "given several times (one teacher pass for all); default: tiny4")
    parser.add_argument("--engine", help="DeepSpeed file; default: gpu-bf16, gpu-fp16 or cpu of ds_configs/, by device")
    parser.add_argument("--out", default="runs/general", help="folder of the run; the same command goes on in it")
    parser.add_argument("--teacher-dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"], help="auto: what is fast")
    parser.add_argument("--fresh", action="store_true", help="begin at step 0; an old run is renamed to OUT.1, OUT.2, ...")
    parser.add_argument("--timeout", type=float, default=600, help="seconds without a word after which a host or rank is lost")
    parser.add_argument("--verbose", action="store_true", help="what DeepSpeed says, too")
    parser.add_argument("--dry-run", action="store_true", help="only say what the run will be and take; needs no GPU")
    parser.add_argument("--gpus", type=int, help="of a dry run: GPUs in all, each a rank; default: one rank as here")
    parser.add_argument("--tflops", type=float, help="of a dry run: what each GPU reaches, for the hours")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher gives it; LOCAL_RANK is what is read
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings over the recipe's")
    parser.error = _refuse  # one line on one rank, as for every other error
    return parser.parse_intermixed_args(argv)


def _refuse(text: str) -> None:
    raise ValueError(f"{text}; settings are written key=value, without --; see bash launch/general.sh --help")


def main(argv: list[str] | None = None, work: Callable | None = None) -> None:
    """`run`, or other work; an error is one line, by rank 0 where all ranks know it, and exit code 2 (1 where one is lost)."""
    stop, rank, code, said = StopRequest(), os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0"), 2, None
    try:
        code = (work or run)(options(argv), stop)
    except ValueError as error:
        said = str(error) if rank == "0" else None
    except OSError as error:  # this rank's alone, such as a full disk under metrics.jsonl
        said = f"rank {rank}: {error}"
    except RuntimeError as error:
        if "by peer" not in str(error) and "imed out" not in str(error):  # gloo's words, whichever call it broke off
            raise
        code, said = 1, f"rank {rank} lost another rank ({str(error)[:200]}...); the same command goes on from its checkpoint"
    if said:
        print(f"error: {said}", file=sys.stderr, flush=True)
    stop.done()
    sys.exit(code)


def run(given: argparse.Namespace, stop: StopRequest) -> int:
    """Join the other ranks, check every input, load, go on from the newest good checkpoint, train, export -> exit code."""
    from pretrain.engine import join  # here: --help answers without torch
    from pretrain.plan import Plan
    from pretrain.train import Run
    ranks = join(given.timeout, given.verbose)
    stop.armed = True
    try:
        plan = ranks.together(partial(Plan, given))  # one rank alone may find fault: its host may lack the shards
        return Run(plan, ranks, stop).finish()
    finally:
        ranks.leave()
