"""Faults, each really done to a real run: no hang, the cause is named, and the same command goes on."""

import os
import shutil
import signal
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest
from runs import NAMES, SETTINGS, SMALL, assert_same_run, launch, logged, processes, ranks_of, start, until

pytestmark = pytest.mark.faults
LONG = [*SETTINGS, "steps=80", "save_every=20", "eval_every=40", "lanes=2"]


@pytest.fixture(scope="module")
def given(inputs) -> list[str]:
    return [*inputs, "--student", SMALL, *LONG, "--out"]


@pytest.fixture(scope="module")
def straight(given, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    launch(*given, out, ranks=2, form="deepspeed")
    return out


def same(straight: Path, out: Path) -> None:
    """A stop logs and saves at a step that the straight run does the same at, since log_every is 1."""
    assert_same_run(straight, out)
    assert not processes(out)


def ended(run: subprocess.Popen, out: Path) -> int:
    """The exit code, and that within a minute no process of the run is left."""
    code = run.wait(timeout=60)
    until(lambda: not processes(out), seconds=60)
    return code


def begun(given, out: Path, form: str) -> subprocess.Popen:
    """A run of two ranks that goes on for some steps from where it was."""
    before = logged(out)
    run = start(*given, out, ranks=2, form=form, log=out.with_name("log"))
    until(lambda: logged(out) > before + 3, run)
    return run


def test_preemption(given, straight, tmp_path):
    """Five stops in one run.  A signal to what was started: 75 from bash; `deepspeed` dies of it, its ranks save and leave.

    A signal to one rank is enough, with 75 also under `deepspeed`.  Where launch.py is killed the ranks save and leave too.
    """
    out, stops = tmp_path / "run", [0]
    for form, number, to, code in [("bash", signal.SIGTERM, "started", 75), ("bash", signal.SIGINT, "started", 75),
                                   ("deepspeed", signal.SIGTERM, "started", -signal.SIGTERM),
                                   ("deepspeed", signal.SIGTERM, "rank 1", 75), ("bash", signal.SIGKILL, "launch.py", 1)]:
        run = begun(given, out, form)
        launcher = next(pid for pid, line in processes(out).items() if "deepspeed.launcher.launch" in line)
        os.kill({"started": run.pid, "rank 1": ranks_of(out)[1], "launch.py": launcher}[to], number)
        assert ended(run, out) == code, (form, number, to)
        said = (tmp_path / "log").read_text()
        assert "the same command goes on (exit code 75)" in said and "Traceback" not in said
        assert (f"goes on from {out}/checkpoints/step-{stops[-1]} " in said) == (stops[-1] > 0)
        stops.append(int(said.partition("stopped after step ")[2].split()[0]))
        assert stops[-2] < stops[-1] < 80 and (out / f"checkpoints/step-{stops[-1]}").is_dir()
    assert f"goes on from {out}/checkpoints/step-{stops[-1]} " in launch(*given, out, ranks=2, form="bash")
    same(straight, out)


def test_a_signal_before_the_first_step_leaves_nothing(given, tmp_path):
    out = tmp_path / "run"
    run = start(*given, out, ranks=2, form="bash", log=tmp_path / "log")
    until(lambda: len(ranks_of(out)) == 2, run)
    run.terminate()
    assert ended(run, out) == 75
    assert not (out / "checkpoints").exists()


def test_a_second_signal_to_bash_kills(given, tmp_path):
    out = tmp_path / "run"
    run = start(*given, out, ranks=2, form="bash", log=tmp_path / "log")
    until(lambda: len(ranks_of(out)) == 2, run)
    for pid in ranks_of(out):
        os.kill(pid, signal.SIGSTOP)  # they cannot answer
    run.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        run.wait(timeout=3)
    run.terminate()
    assert ended(run, out) not in (0, 75)


def test_a_rank_is_killed_in_mid_step(given, straight, tmp_path):
    """First rank 1, then, in the run that goes on, rank 0."""
    out = tmp_path / "run"
    for victim, step in ((1, 20), (0, 40)):
        run = start(*given, out, ranks=2, form="deepspeed", log=tmp_path / "log")
        until(lambda step=step: (out / f"checkpoints/step-{step}").is_dir() and logged(out) > step + 3, run)
        os.kill(ranks_of(out)[victim], signal.SIGKILL)
        assert ended(run, out) not in (0, 75)
        said = (tmp_path / "log").read_text()
        assert f"error: rank {1 - victim} lost another rank" in said and "Traceback" not in said
    assert f"goes on from {out}/checkpoints/step-" in launch(*given, out, ranks=2, form="deepspeed")
    same(straight, out)


@pytest.fixture(scope="module")
def straight_of(inputs, tmp_path_factory):
    """6 steps on so many ranks, each of them saved."""

    @lru_cache
    def run(ranks: int) -> Path:
        out = tmp_path_factory.mktemp("saving") / "run"
        launch(*inputs, "--student", SMALL, *SETTINGS, "save_every=1", "--out", out, ranks=ranks,
               form="deepspeed" if ranks > 1 else "python")
        return out

    return run


KILLER = '''
import os, signal
call, _, text = os.environ["KILL_AT"].partition(" ")

def watched(do):
    def wrapper(what, *rest, **named):
        path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)
        if text in path and os.environ.get("RANK", "0") == "0":
            os.killpg(0, signal.SIGKILL)
        return do(what, *rest, **named)
    return wrapper

setattr(os, call, watched(getattr(os, call)))
'''


@pytest.mark.parametrize("moment", ["fsync model_states", "fsync manifest.json", "replace step-4.part/manifest.json",
                                    "rename step-4.part", "replace latest", "unlink optim_states", "fsync step-2.part two ranks"])
def test_all_are_killed_in_the_middle_of_a_save(moment, inputs, straight_of, tmp_path):
    """The moments of `save`, in their order: each system call of rank 0 on that file kills ranks and launchers.

    "unlink" is the removal of an old checkpoint, once the new one is in its place.
    """
    ranks, form = (2, "deepspeed") if "two ranks" in moment else (1, "python")
    given = [*inputs, "--student", SMALL, *SETTINGS, "save_every=1", "--out"]
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    run = start(*given, tmp_path / "run", ranks=ranks, form=form, log=tmp_path / "log",
                variables={"KILL_AT": moment.removesuffix(" two ranks"), "PYTHONPATH": str(tmp_path)})
    assert ended(run, tmp_path / "run") == -signal.SIGKILL
    said = launch(*given, tmp_path / "run", ranks=ranks, form=form)
    first = {"fsync model_states": 0, "fsync manifest.json": 0, "replace latest": 1, "fsync step-2.part two ranks": 1}.get(moment)
    first = first if first is not None else 4 if moment.startswith("unlink") else 3
    assert (f"checkpoints/step-{first} " in said) if first else ("goes on" not in said)
    same(straight_of(ranks), tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["latest", "step-4", "step-5", "step-6"]


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a disk to fill needs the right to mount one")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_during_a_save(inputs, straight_of, small_disk):
    out = small_disk / "run"
    given = [*inputs, "--student", SMALL, *SETTINGS, "save_every=1", "--out"]
    said = launch(*given, out, ranks=2, form="deepspeed", expect=2)
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert "cannot be written" in said and "is the disk full?" in said and "The last good checkpoint is " in said
    assert not list((out / "checkpoints").glob("*.part"))
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert "goes on from" in launch(*given, out, ranks=2, form="deepspeed")
    same(straight_of(2), out)


def test_a_shard_is_deleted_in_mid_run(given, straight, shards_folder, tmp_path):
    """Each of the two lanes opens its next shard when it comes to it."""
    copy, out, log = tmp_path / "shards", tmp_path / "run", tmp_path / "log"
    shutil.copytree(shards_folder, copy)
    given = ["--shards", copy, *given[2:]]
    run = start(*given, out, ranks=2, form="deepspeed", log=log)
    until(lambda: logged(out) > 3, run)
    for shard in copy.glob("train-*.tar"):
        shard.rename(shard.with_suffix(".away"))
    assert ended(run, out) == 2
    said = log.read_text()
    assert said.count("error: ") == 1 and ".tar: missing, but the manifest lists it" in said and "Traceback" not in said
    for shard in copy.glob("train-*.away"):
        shard.rename(shard.with_suffix(".tar"))
    launch(*given, out, ranks=2, form="deepspeed")
    same(straight, out)


def test_a_student_is_whole_at_each_moment_of_its_export(inputs, tmp_path):
    """Killed between the two renames: the old student stands beside its name, and the same command exports again."""
    out = tmp_path / "run"
    given = [*inputs, "--student", SMALL, *SETTINGS, "--out", out]
    launch(*given)
    (tmp_path / "sitecustomize.py").write_text(KILLER)
    run = start(*given, log=tmp_path / "log", variables={"KILL_AT": f"rename {NAMES[0]}.part", "PYTHONPATH": str(tmp_path)})
    assert ended(run, out) == -signal.SIGKILL
    assert sorted(p.name for p in (out / "students").iterdir()) == [f"{NAMES[0]}.old", f"{NAMES[0]}.part"]
    launch(*given)
    assert [p.name for p in (out / "students").iterdir()] == [NAMES[0]]
