"""Runs of general distillation through the real launchers, for the tests: start, wait, read what they left."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

# A shell that starts the tests in the background has SIGINT ignored, and so would every run.
signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
SMALL = "tiny4:layers=2,hidden=12,intermediate=24"  # narrower than the teacher: random weights and a projection
SAME = "tiny4:layers=2,hidden=24,intermediate=48"  # as wide as the teacher: its layers are copied
NAMES = tuple(spec.replace(":", "-").replace(",", "-").replace("=", "-") for spec in (SMALL, SAME))
SETTINGS = ["batch=16", "steps=6", "save_every=3", "eval_every=3", "log_every=1", "lr=1e-3", "deterministic=true", "init=random"]


def start(*arguments, ranks: int = 1, form: str = "python", cwd: Path = ROOT, variables: dict | None = None,
          log: Path | None = None) -> subprocess.Popen:
    """Start launch/general.sh in a session of its own.  `form`: python (one rank, no launcher), deepspeed or bash."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = "launch/general.sh"
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                    "CC": "/bin/false", "CXX": "/bin/false", **(variables or {})}  # nothing may need a compiler
    launcher = ["--num_gpus", str(ranks), "--master_port", port]
    command = {"python": [sys.executable, script], "deepspeed": ["deepspeed", *launcher, script], "bash": ["bash", script]}[form]
    if form == "bash":
        environment["DS_ARGS"] = " ".join(launcher)
    return subprocess.Popen([*command, *map(str, arguments)], cwd=cwd, env=environment, text=True, start_new_session=True,
                            stdout=open(log, "w") if log else subprocess.PIPE, stderr=subprocess.STDOUT)


def launch(*arguments, expect: int = 0, **how) -> str:
    """Run launch/general.sh to its end -> what it printed."""
    run = start(*arguments, **how)
    try:
        said, _ = run.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(run.pid, signal.SIGKILL)
        raise
    assert run.returncode == expect, said[-3000:]
    return said


def until(condition, run: subprocess.Popen | None = None, seconds: float = 120) -> None:
    """Wait for a condition, which must come before the process ends."""
    end = time.monotonic() + seconds
    while not condition():
        assert run is None or run.poll() is None, "the run ended first"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def processes(out: Path) -> dict[int, str]:
    """Living processes that have `out` in their command line -> that line."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(out) in line:
            found[int(process.name)] = line
    return found


def ranks_of(out: Path) -> list[int]:
    """Process ids of the ranks of a launched run, rank 0 first."""
    lines = {line.partition("--local_rank=")[2]: pid for pid, line in processes(out).items()
             if "--local_rank=" in line and "launcher" not in line}
    return [pid for _, pid in sorted(lines.items())]


def logged(out: Path) -> int:
    """How many lines of figures stand in the run's folder."""
    return len((out / "metrics.jsonl").read_text().splitlines()) if (out / "metrics.jsonl").exists() else 0


def metrics(out: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines), "a step stands twice"
    return {line["step"]: line for line in lines}


def learned(figures: dict) -> dict:
    """What must be equal between runs: everything but the clock's figures."""
    clock = ("rows/s", "tokens/s", "data_wait", "matrix_rate", "memory_GB")
    return {name: value for name, value in figures.items() if name not in clock and not name.startswith("time/")}


def weights(out: Path, student: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(out / "students" / student / "model.safetensors")


def assert_same_run(one: Path, other: Path, students=NAMES[:1]) -> None:
    """Every logged figure and every weight, bit for bit."""
    before, after = metrics(one), metrics(other)
    assert sorted(before) == sorted(after)
    for step in before:
        assert learned(before[step]) == learned(after[step]), step
    for name in students:
        straight, resumed = weights(one, name), weights(other, name)
        assert all(torch.equal(straight[k], resumed[k]) for k in straight)
