"""What a person reads after a plausible mistake: one line with what was given, what is wrong and what to write.

What is more to its subject than a message (each damage of a shard, each source, ...) is in the tests of that subject."""

import errno
import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
from conftest import save_tokenizer
from runs import ROOT, SMALL, launch

import finetune.qnli
import shards.build
import shards.look
from pretrain.checkpoint import newest_good
from pretrain.general import options
from pretrain.plan import Plan


def train(*argv: str) -> str:
    """The error of general distillation's command line."""
    with pytest.raises(ValueError) as error:
        given = options([*argv])
        if given.dry_run:
            from launch.budget import budget

            budget(given)
        Plan(given)
    return str(error.value)


def go_on(*settings: str) -> str:
    """The error of a run over the checkpoint of one with lr=1e-4 after 50 of 100 steps."""
    tag, was = Path("run/checkpoints/step-50"), {"lr": 1e-4, "batch": 8, "steps": 100, "keep_every": 0}
    tag.mkdir(parents=True)
    (tag / "manifest.json").write_text(json.dumps({"step": 50, "files": {}, "settings": was, "machine": {}}))
    now = was | {key: float(value) for key, value in (setting.split("=") for setting in settings)}
    with pytest.raises(ValueError) as error:
        newest_good(tag.parent, {"settings": now, "machine": {}})
    return str(error.value)


def listen_elsewhere(*argv: str) -> str:
    """The error of a rank whose port another program has."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = launch(*argv, expect=2, variables={"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
                                                  "MASTER_PORT": port})
    assert f"127.0.0.1:{port}" in said and f"--master_port {int(port) + 1}" in said
    return said.strip().splitlines()[-1]


def build_on_a_full_disk(argv: list[str]) -> int:
    def fsync(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        return shards.build.main(argv)


@pytest.fixture
def place(tmp_path, shards_folder, teacher_folder, text_folder, monkeypatch) -> Path:
    """A folder with shards, a teacher, text, a file, an empty folder and task data, in which the commands are given."""
    for name, target in (("shards", shards_folder), ("teacher", teacher_folder), ("text", text_folder), ("ds_configs",
                                                                                                         ROOT / "ds_configs")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    shutil.copytree(teacher_folder, tmp_path / "cased")
    save_tokenizer(tmp_path / "cased", do_lower_case=False)
    (tmp_path / "noweights").mkdir()
    shutil.copy(teacher_folder / "config.json", tmp_path / "noweights")
    (tmp_path / "deberta").mkdir()
    (tmp_path / "deberta/config.json").write_text('{"model_type": "deberta-v2"}')
    (tmp_path / "engine.json").write_text('{"train_micro_batch_size_per_gpu": 8,}')
    (tmp_path / "qnli").mkdir()
    (tmp_path / "qnli/train.tsv").write_text("question\tsentence\tlabel\na\tb\tentailment\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAIN = ["--shards", "shards", "--teacher", "teacher", "--student", SMALL]
MISTAKES = {
    "shards and teacher swapped": (train, ["--shards", "teacher", "--teacher", "shards"], "no shards in teacher"),
    "text, not shards": (train, [*TRAIN, "--shards", "text"], "no shards in text.*python -m shards.build"),
    "a folder without a model": (train, [*TRAIN, "--teacher", "empty"], "'empty': the folder holds no model.*config.json"),
    "a teacher of text": (train, [*TRAIN, "--teacher", "file"], "model 'file'"),
    "a teacher's name with a typo": (train, [*TRAIN, "--teacher", "bert-base-uncasd"], "not a folder here, and the hub did not"),
    "a path with a typo": (train, [*TRAIN, "--teacher", "./techer/x"], "no such folder"),
    "an option without its dashes": (train, [*TRAIN, "out=runs/x"], "unknown setting 'out'.*options begin with --"),
    "a setting with dashes": (train, [*TRAIN, "--lr", "1e-4"], "unrecognized arguments: --lr; settings are written key=value"),
    "a setting with a space": (train, [*TRAIN, "lr", "1e-4"], "'lr' is no setting; write key=value"),
    "a student that is a path": (train, [*TRAIN, "--student", "runs/x"], "unknown student 'runs/x' .there are tiny4"),
    "a boolean in words": (train, [*TRAIN, "deterministic=yes, please"], "a valid boolean.*write such as deterministic=false"),
    "a batch in words": (train, [*TRAIN, "batch=1k"], "batch=1k: must be a valid integer.*write such as batch=256"),
    "an engine file that is no JSON": (train, [*TRAIN, "--engine", "engine.json"], "--engine engine.json: .*see ds_configs/"),
    "an engine file that is a folder": (train, [*TRAIN, "--engine", "ds_configs"], "--engine ds_configs: "),
    "a GPU's engine file on a CPU": (train, [*TRAIN, "--engine", "ds_configs/gpu-fp16.json"], "fp16 needs a GPU.*cpu.json"),
    "three ranks for 64 lanes": (train, [*TRAIN, "--dry-run", "--gpus", "3"], "do not divide over 3 ranks; start with"),
    "GPUs in words": (train, [*TRAIN, "--dry-run", "--gpus", "all"], "--gpus: invalid int value: 'all'"),
    "a profile of one step": (train, [*TRAIN, "profile=100"], "profile=100: write the first step .* profile=100:105"),
    "a profile that ends first": (train, [*TRAIN, "profile=5:5"], "profile=5:5: write the first step"),
    "a teacher with another tokenizer": (train, [*TRAIN, "--teacher", "cased"], "teacher cased has another .*; build shards with "
                                         "--tokenizer cased"),
    "a checkpoint of other settings": (go_on, ["lr=1e-3"], "step-50 belongs to a run with other settings: lr was 0.0001, is "
                                       "0.001. Give the same settings, another --out, or --fresh"),
    "a checkpoint of a later step": (go_on, ["steps=20"], "is 50 steps old already; write steps=50 or more, or --fresh"),
    "a port in use": (listen_elsewhere, [*TRAIN, "--out", "run"], "ranks cannot meet at .*; if another run has the port, write"),
    "no space": (build_on_a_full_disk, ["text", "--tokenizer", "teacher", "--out", "new", "--workers", "1"],
                 "--out new: .*No space left on device; make room or mend it, then the same command goes on"),
    "no source": (shards.build.main, ["--tokenizer", "teacher", "--out", "new"], "required: SOURCE"),
    "no tokenizer": (shards.build.main, ["text", "--out", "new"], "required: --tokenizer"),
    "a source that is not there": (shards.build.main, ["txet/*.txt", "--tokenizer", "teacher", "--out", "new"], "txet"),
    "a tokenizer that is not there": (shards.build.main, ["text", "--tokenizer", "empty", "--out", "new"], "empty"),
    "out is a file": (shards.build.main, ["text", "--tokenizer", "teacher", "--out", "file"], "file"),
    "shards of other settings": (shards.build.main, ["text", "--tokenizer", "teacher", "--out", "shards", "--row-length", "64"],
                                 "row_length"),
    "rows of no length": (shards.build.main, ["text", "--tokenizer", "teacher", "--out", "new", "--row-length", "0"],
                          "--row-length 0: must be between"),
    "a look into text": (shards.look.main, ["text"], "no shards in text"),
    "a row that is not there": (shards.look.main, ["shards", "--row", "train-00000:999999"], "999"),
    "a student that was not trained": (finetune.qnli.main, ["--teacher", "teacher", "--student", "runs/general/students/tiny4",
                                                            "--data", "qnli"], "no such folder"),
    "task data that is not there": (finetune.qnli.main, ["--teacher", "teacher", "--student", "teacher", "--data", "empty",
                                                         "length=64"],
                                    "empty.*train.tsv"),
    "task data without dev rows": (finetune.qnli.main, ["--teacher", "teacher", "--student", "teacher", "--data", "qnli",
                                                        "length=64"], "dev"),
    "a setting of the other stage": (finetune.qnli.main, ["lr=1e-4"], "unknown setting 'lr'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_answered_in_a_line(mistake, place, capsys):
    program, argv, says = MISTAKES[mistake]
    if program in (train, go_on, listen_elsewhere):
        said = program(*argv)
    else:
        try:
            code = program(argv)
        except SystemExit as end:  # argparse's
            code = end.code
        said = capsys.readouterr().err.strip()
        assert code in (1, 2)
    assert "\n" not in said and "Traceback" not in said
    assert re.search(says, said), said


def test_deepspeed_talks_only_when_asked(inputs, tmp_path):
    """A run that is refused on its first input, so that what stands there is the launcher's and DeepSpeed's."""
    given = [*inputs, "--student", "tiny9", "--out", tmp_path / "run"]
    assert "[INFO]" not in launch(*given, form="bash", expect=2)
    assert "[INFO]" in launch(*given, "--verbose", form="bash", expect=2)
