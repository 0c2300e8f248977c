"""Checkpoints: which one is taken, which ones stay, and that a resumed run is the straight one, on any ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from runs import NAMES, SETTINGS, SMALL, assert_same_run, launch, metrics

from pretrain import checkpoint
from pretrain.engine import Engine
from pretrain.recipe import NOT_LEARNED, Recipe


class Alone:
    """pretrain.ranks.Ranks of one rank, without torch.distributed."""

    rank, world = 0, 1

    def first(self, work):
        try:
            return work()
        except OSError as error:
            raise ValueError(str(error)) from error

    def agree(self, error):
        if error:
            raise ValueError(str(error))


class Student:
    """Writes what DeepSpeed would, in small."""

    name, error = "tiny4", None

    def save(self, folder: Path):
        (folder / self.name / "optim_states.pt").write_bytes(bytes(range(200)))
        return self.error


ABOUT = {"settings": {"steps": 90, "batch": 16, "lr": 1e-3, "log_every": 1, "deterministic": True,
                      "students": {"tiny4": {"layers": 4}}, "shards": "5a", "teacher": "7e"},
         "machine": {"ranks": 2, "precision": "fp32"}}


def save(folder: Path, step: int, student=None, keep_every: int = 0) -> Path:
    about = ABOUT | {"settings": ABOUT["settings"] | {"keep_every": keep_every}}
    return checkpoint.save(folder, [student or Student()], Alone(), step, about, last=None)


def steps(folder: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in folder.glob("step-*"))


def test_the_newest_three_and_every_nth_stay(tmp_path):
    for step in range(1, 10):
        save(tmp_path, step, keep_every=4)
    assert steps(tmp_path) == [4, 7, 8, 9]
    assert (tmp_path / "latest").read_text() == "step-9"


def test_nothing_goes_before_the_new_one_is_verified(tmp_path, monkeypatch):
    for step in (1, 2, 3):
        save(tmp_path, step)

    def damaged(tag):
        raise ValueError(f"checkpoint {tag}: read back otherwise")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "verified", damaged)
        with pytest.raises(ValueError, match="step-4: read back otherwise"):
            save(tmp_path, 4)
    assert {1, 2, 3} <= {*steps(tmp_path)} and (tmp_path / "latest").read_text() == "step-3"


def test_a_save_that_fails_leaves_nothing_of_itself(tmp_path):
    save(tmp_path, 1)
    failing = Student()
    failing.error = OSError("optim_states.pt cannot be written (No space left on device)")
    with pytest.raises(ValueError, match="No space left"):
        save(tmp_path, 2, failing)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-1"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "truncated": (lambda tag: (tag / "tiny4/optim_states.pt").write_bytes(b"\0" * 199), "199 bytes, not 200; it is cut"),
    "emptied": (lambda tag: (tag / "tiny4/optim_states.pt").write_bytes(b""), "has 0 bytes, not 200"),
    "one flipped byte": (lambda tag: flip(tag / "tiny4/optim_states.pt"), "is damaged"),
    "missing": (lambda tag: (tag / "tiny4/optim_states.pt").unlink(), "tiny4/optim_states.pt has no bytes, not 200"),
    "no manifest": (lambda tag: (tag / "manifest.json").unlink(), "manifest.json is missing or damaged"),
    "half a manifest": (lambda tag: (tag / "manifest.json").write_text('{"step": 2'), "manifest.json is missing or damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(damage, tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    harm, says = DAMAGES[damage]
    harm(tmp_path / "step-2")
    tag, step, notes, _ = checkpoint.newest_good(tmp_path, ABOUT)
    assert tag == tmp_path / "step-1" and step == 1
    assert notes[0].startswith(f"passed over: checkpoint {tmp_path / 'step-2'}") and says in notes[0]
    harm(tmp_path / "step-1")
    with pytest.raises(ValueError, match="no good checkpoint .*step-2.*step-1.*--fresh"):
        checkpoint.newest_good(tmp_path, ABOUT)


@pytest.mark.parametrize("text", [None, "", "step-77"])
def test_what_latest_says_does_not_matter(text, tmp_path):
    save(tmp_path, 5)
    (tmp_path / "latest").unlink()
    if text is not None:
        (tmp_path / "latest").write_text(text)
    (tmp_path / "step-9.part").mkdir()  # of a killed run
    assert checkpoint.newest_good(tmp_path, ABOUT)[1] == 5
    save(tmp_path, 6)
    assert steps(tmp_path) == [5, 6] and (tmp_path / "latest").read_text() == "step-6"
    assert checkpoint.newest_good(tmp_path / "nothing", ABOUT) is None


def changed(part: str, **values) -> dict:
    return {**ABOUT, part: {**ABOUT[part], **values}}


def test_other_learning_settings_are_refused_and_listed(tmp_path):
    save(tmp_path, 5)
    for about, says in [(changed("settings", lr=2e-3), "lr was 0.001, is 0.002"),
                        (changed("settings", teacher="8f"), "teacher was 7e, is 8f"),
                        (changed("settings", new=1), "new was None, is 1"),
                        (changed("settings", projection="each"), "other settings: projection was shared, is each."),
                        (changed("settings", students={"tiny4": {"layers": 3}}), "{'layers': 4}}, is {'tiny4': {'layers': 3}}"),
                        (changed("settings", shards="1"), "shards was 5a, is 1")]:
        with pytest.raises(ValueError, match="other settings: ") as error:
            checkpoint.newest_good(tmp_path, about)
        assert says in str(error.value)
    both = changed("settings", lr=2e-3, teacher="8f")
    with pytest.raises(ValueError, match="lr was 0.001, is 0.002; teacher was 7e"):
        checkpoint.newest_good(tmp_path, both)
    with pytest.raises(ValueError, match="is 5 steps old already; write steps=5 or more"):
        checkpoint.newest_good(tmp_path, changed("settings", steps=4))


def test_what_may_change_and_is_said(tmp_path):
    save(tmp_path, 5)
    *_, notes, convert = checkpoint.newest_good(tmp_path, changed("settings", log_every=7, deterministic=False))
    assert notes == [f"goes on from {tmp_path / 'step-5'} (row 80)"] and not convert
    older = checkpoint.newest_good(tmp_path, changed("settings", projection="shared"))  # a setting that the tag does not know
    assert older == checkpoint.newest_good(tmp_path, ABOUT)
    *_, notes, convert = checkpoint.newest_good(tmp_path, changed("settings", steps=120))
    assert "steps was 90, is 120: the rate of every later step follows" in notes[1] and not convert
    *_, notes, convert = checkpoint.newest_good(tmp_path, changed("machine", ranks=1))
    assert convert and "ranks was 2, is 1: through DeepSpeed's universal checkpoint" in notes[1]
    assert {*NOT_LEARNED} <= {*Recipe.__dataclass_fields__}


class DeepSpeed:
    """As much of an engine as Engine.trouble looks at."""

    applied, norm = True, 1.0

    def was_step_applied(self):
        return self.applied

    def get_global_grad_norm(self):
        return self.norm


@pytest.mark.parametrize("allowed", [0, 20])  # fp32 and bf16, and fp16, whose loss scale is found by skipping
def test_skipped_updates_stop_the_run(allowed):
    engine = Engine.__new__(Engine)
    engine.deepspeed, engine.allowed, engine.skipped = DeepSpeed(), allowed, 0
    for _ in range(2):  # an update that is made begins the count anew
        engine.deepspeed.applied = True
        assert engine.trouble() is None
        engine.deepspeed.applied = False
        for _ in range(allowed):
            assert engine.trouble() is None
    assert f"{allowed + 1} updates skipped in a row" in engine.trouble()
    engine.deepspeed.applied, engine.deepspeed.norm = True, float("nan")
    assert "the gradient norm is nan" in engine.trouble()


def test_a_loss_that_is_not_finite_ends_all_ranks(inputs, tmp_path):
    """A rate of 1e30 after one update: step, rows and last good checkpoint are named, and look shows the rows."""
    from shards.block import read_manifest
    from shards.look import show_row

    said = launch(*inputs, "--student", SMALL, "--out", tmp_path / "run", *SETTINGS, "save_every=1", "lr=1e30", "warmup=0",
                  ranks=2, form="deepspeed", expect=2)
    assert said.count("error: ") == 1 and "the loss is not finite in step 2" in said and "Traceback" not in said
    assert f"last good checkpoint: {tmp_path}/run/checkpoints/step-1" in said
    assert steps(tmp_path / "run/checkpoints") == [1]
    place = said.partition("in step 2; rows ")[2].split(",")[0].split()[0]
    shards = Path(inputs[1])
    assert "[CLS]" in show_row(shards, read_manifest(shards), place, inputs[3])


def engine_file(path: Path, stage: int, precision: str, offload: str = "none") -> Path:
    bf16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}} if precision == "bf16" else {}
    zero = {"stage": stage, "offload_optimizer": {"device": offload}}
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, **bf16}))
    return path


def cut(out: Path, copy: Path, after: int) -> Path:
    """A copy of a run as if it had been killed after a step."""
    if out != copy:
        shutil.copytree(out, copy)
    for tag in (copy / "checkpoints").glob("step-*"):
        if int(tag.name[5:]) > after:
            shutil.rmtree(tag)
    return copy


@pytest.mark.parametrize("stage, precision, ranks", [(1, "bf16", 2), (2, "bf16", 2), (1, "fp32", 1)])
def test_on_the_same_machine_a_resume_is_bit_exact(stage, precision, ranks, inputs, tmp_path):
    """Dropout on; ZeRO-2 in fp32 with two students is in test_general."""
    engine = engine_file(tmp_path / "engine.json", stage, precision)
    how = {"ranks": ranks, "form": "deepspeed" if ranks > 1 else "python"}
    given = [*inputs, "--student", SMALL, "--engine", engine, *SETTINGS, "dropout=0.1", "--out"]
    launch(*given, tmp_path / "straight", **how)
    resumed = cut(tmp_path / "straight", tmp_path / "resumed", 3)
    assert "universal" not in launch(*given, resumed, **how)
    assert_same_run(tmp_path / "straight", resumed)


def apart(one: Path, other: Path) -> float:
    """The largest relative difference of any step's losses."""
    before, after = metrics(one), metrics(other)
    assert sorted(before) == sorted(after)
    return max(abs(after[step][name] / before[step][name] - 1) for step in before for name in before[step]
               if name.endswith("loss") or name.startswith(("hidden", "attention", "embedding")))


def test_ranks_stage_and_micro_batch_may_change_in_mid_run(one_rank, two_ranks_in_pieces, inputs, tmp_path):
    """2 ranks, then 1, then 2: apart from the straight run by no more than twice what such a change moves a straight run.

    Nor is less than one float32 rounding, in which the losses of rows are computed, a difference.
    """
    straight, engine = two_ranks_in_pieces
    given = [*inputs, "--student", SMALL, *SETTINGS, "save_every=2", "--out"]
    mixed = cut(straight, tmp_path / "mixed", 2)
    (mixed / "checkpoints/.universal/half").mkdir(parents=True)  # of a killed conversion
    said = launch(*given, mixed)
    assert "ranks was 2, is 1; zero_stage was 1, is 2: through DeepSpeed's universal checkpoint" in said
    assert not (mixed / "checkpoints/.universal").exists()
    said = launch(*given, cut(mixed, mixed, 4), "--engine", engine, ranks=2, form="deepspeed")
    assert "goes on from" in said and "ranks was 1, is 2; zero_stage was 2, is 1" in said
    bound = apart(straight, one_rank)  # what the machine alone does, without a restart
    print("machine alone:", bound, "mixed:", apart(straight, mixed))
    assert 0 < bound < 1e-5 and apart(straight, mixed) <= max(2 * bound, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("precision, offload, says", [
    ("bf16", "none", "precision was {}, is {}:"), ("fp32", "cpu", "offload was {}, is {}:"),
    ("bf16", "cpu", "offload was False, is True; precision was fp32, is bf16:")], ids=str)
def test_precision_and_offload_may_change_in_mid_run(precision, offload, says, one_rank, inputs, tmp_path):
    """fp32, then the other, then fp32: apart from fp32 by no more than twice what a run in the other is, which resumes exactly.

    In float32 nor is less than one rounding, in which the losses of rows are computed, a difference.
    """
    other = ["--engine", engine_file(tmp_path / "engine.json", 2, precision, offload)]
    given = [*inputs, "--student", SMALL, *SETTINGS, "--out"]
    launch(*given, tmp_path / "other", *other)
    resumed = cut(tmp_path / "other", tmp_path / "resumed", 3)
    assert "universal" not in launch(*given, resumed, *other)
    assert_same_run(tmp_path / "other", resumed)
    mixed, (was, now) = cut(one_rank, tmp_path / "mixed", 3), ("fp32", "bf16") if offload == "none" else (False, True)
    assert says.format(was, now) in launch(*given, mixed, *other, "save_every=1")
    assert "through DeepSpeed's universal checkpoint" in launch(*given, cut(mixed, mixed, 4))
    bound, limit = apart(one_rank, tmp_path / "other"), 2e-2 if precision == "bf16" else 1e-6
    print(precision, offload, "alone:", bound, "mixed:", apart(one_rank, mixed))
    assert 0 < bound < limit and apart(one_rank, mixed) <= max(2 * bound, torch.finfo(torch.float32).eps)


def test_steps_may_grow(one_rank, inputs, tmp_path):
    shutil.copytree(one_rank, tmp_path / "run")
    said = launch(*inputs, "--student", SMALL, "--out", tmp_path / "run", *SETTINGS, "steps=8")
    assert "steps was 6, is 8: the rate of every later step follows" in said
    rates = [metrics(tmp_path / "run")[step]["lr"] for step in range(1, 9)]
    short, long = (Recipe(steps=n, lr=1e-3) for n in (6, 8))
    assert rates == [short.rate(step) for step in range(6)] + [long.rate(step) for step in (6, 7)]
    assert (tmp_path / "run/students" / NAMES[0]).is_dir()
