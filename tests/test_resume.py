"""A training that is killed goes on bit for bit, one that no longer gains ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_finetune import CPU, made_up_pairs, rows_of, save_place
from test_qnli import QUICK, run

from finetune import distill, stages
from finetune.qnli import Settings

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer_folder):
    """A teacher, a narrower student and 40 + 20 rows."""
    return save_place(tmp_path_factory.mktemp("resume"), tokenizer_folder)


class Killed(Exception):
    """In the place of a kill."""


def trained(place, resume, stage, killed_after, measured=lambda epoch: -abs(epoch - 2.0), **settings):
    """The weights and the curve of four epochs with dropout; a run is given up in its measuring after an epoch."""
    model = distill.open_classifier(place / "student", 0, CPU)
    rows, epochs = rows_of(place / "student", made_up_pairs(20, 3)), iter(range(1, 9))

    def loss(batch):
        return torch.nn.functional.cross_entropy(distill.logits(model, batch), batch.labels, reduction="none")

    def measure():
        epoch = next(epochs)
        if epoch == killed_after:
            raise Killed
        return measured(epoch + started)

    started = len(torch.load(resume, weights_only=True)[3]) if resume.exists() else 0
    settings = Settings(batch=4, **{f"{stage}_lr": 1e-2, f"{stage}_epochs": 4}, **settings)
    curve = distill.fit(model, loss, rows, settings, stage, 0, measure, resume)
    return model.state_dict(), curve


@pytest.mark.parametrize("stage", ["gold", "layers"])
def test_a_killed_training_goes_on_bit_for_bit(place, tmp_path, stage):
    straight, curve = trained(place, tmp_path / "straight.pt", stage, 0)
    before = torch.get_rng_state()
    for epoch in (2, 2):  # two kills: in the second epoch, and in the second one after it went on
        with pytest.raises(Killed):
            trained(place, tmp_path / "training.pt", stage, epoch)
    resumed, again = trained(place, tmp_path / "training.pt", stage, 0)
    assert again == curve and len(curve) == 4
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    assert torch.equal(torch.get_rng_state(), before)
    finished, same = trained(place, tmp_path / "training.pt", stage, 1)  # nothing is left to train or to measure
    assert same == curve and all(torch.equal(value, finished[name]) for name, value in straight.items())


@pytest.mark.parametrize("stage, measured, epochs", [
    ("gold", [0.5, 0.6, 0.6, 0.5], 4), ("gold", [0.6, 0.6, 0.5, 0.7], 3), ("gold", [0.9, 0.1, 0.1, 0.95], 3),
    ("layers", [3, 2, 1, 1.5], 4), ("layers", [1, 2, 3, 0.5], 3)])
def test_patience(place, tmp_path, stage, measured, epochs):
    resume = tmp_path / "training.pt"
    _, curve = trained(place, resume, stage, 0, lambda epoch: measured[epoch - 1], patience=2)
    assert len(curve) == epochs
    _, again = trained(place, resume, stage, 1, patience=2)  # one that had ended does not begin again
    assert again == curve


@pytest.mark.faults
def test_a_killed_run_ends_with_the_model_of_an_unbroken_one(place, tmp_path):
    settings = [word for word in QUICK if not word.startswith("gold_epochs")]
    command = [sys.executable, str(ROOT / "finetune" / "qnli.py"), "--student", str(place / "student"), "--data",
               str(place / "rows"), "method=gold", "--stages", "gold", *settings]
    again = [*command, "--out", str(tmp_path / "killed"), "gold_epochs=60"]
    with subprocess.Popen(again, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(tmp_path.glob("killed/*.part/training.pt")):
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "student").exists()
    said = subprocess.run(again, capture_output=True, text=True, check=True).stdout
    assert "gold: goes on after epoch " in said
    subprocess.run([*again, "--out", str(tmp_path / "straight")], capture_output=True, check=True)
    straight, killed = ((tmp_path / name / "student") for name in ("straight", "killed"))
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in straight.iterdir())
    for name in ("model.safetensors", "stage.json"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()
    assert not list(tmp_path.glob("killed/*.part"))


@pytest.mark.faults
@pytest.mark.parametrize("size", ["60k", "300k", "560k", "700k"])  # the state, a second one, the weights, the tokenizer
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(place, tmp_path, capsys, size):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        assert run(place, disk / "out") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith(f"error: --out {disk}/out: ")
        assert error.endswith("; make room or mend it, then the same command goes on\n")
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert run(place, disk / "out") == 0 and not list(disk.glob("out/*.part"))
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_what_another_run_left_is_not_gone_on_from(place, tmp_path):
    part = tmp_path / "out" / "student.00000000.part"
    part.mkdir(parents=True)
    (part / "training.pt").write_bytes(b"of other settings")
    assert run(place, tmp_path / "out", "method=gold", "--stages", "gold") == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["student"]
    assert not (tmp_path / "out" / "student" / "training.pt").exists()


def test_the_first_rank_removes_nothing_that_another_has_yet_to_read(tmp_path, monkeypatch):
    """Resumed behind the last epoch of `layers` a rank only reads: the first one waits for all before it goes on."""
    there = []

    class Ranks:
        rank = 0

        def agree(self, error):
            there.append([path.parent.name.rpartition(".")[2] for path in tmp_path.rglob("training.pt")])

    def resumed(part):
        (part / "training.pt").write_bytes(b"all epochs")
        return {}
    monkeypatch.setattr(stages, "met", Ranks)
    stages.stage(tmp_path / "layers", {"seed": 0}, resumed)
    assert there == [[], ["part"], []]
