"""The QNLI stage on the ranks of a launcher: the same updates as on one, the first rank's files and words, a resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_finetune import made_up_pairs, save_model, write_tsv

# SGD in the place of AdamW, which divides by the gradients' size and so turns rounding of tiny ones into whole updates.
PLAIN = """
import os, sys, time, torch
time.sleep(2 * (os.environ.get("RANK") == "0"))
class AdamW(torch.optim.SGD):
    def __init__(self, groups, lr, fused):
        super().__init__(groups, lr=lr)
torch.optim.AdamW = AdamW
import finetune.distill
finetune.distill.fastest_dtype = lambda: "fp32"  # bf16 would round each rank's gradients before they are summed
from finetune.qnli import main
sys.exit(main(sys.argv[1:]))
"""
RANKS = 3
# Of 40 rows in batches of 13 the last batch has one: two of the three ranks have none of it.
SETTINGS = ["batch=13", "length=32", "teacher_epochs=2", "layers_epochs=2", "predictions_epochs=2", "min_teacher=0", "clip=0",
            "teacher_lr=0.1", "layers_lr=0.01", "predictions_lr=0.1", "augment=1", "warmup=0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer_folder):
    """A teacher and a narrower student without dropout, which each rank draws by itself; 40 + 20 rows."""
    folder = tmp_path_factory.mktemp("several")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    save_model(folder / "teacher", tokenizer_folder, **still)
    save_model(folder / "student", tokenizer_folder, width=16, layers=2, seed=1, **still)
    (folder / "rows").mkdir()
    write_tsv(folder / "rows" / "train.tsv", made_up_pairs(40, 0))
    write_tsv(folder / "rows" / "dev.tsv", made_up_pairs(20, 1))
    (folder / "plain.py").write_text(PLAIN)
    return folder


def start(place, out, ranks, *more):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(place / "plain.py"), "--teacher", str(place / "teacher"), "--student",
               str(place / "student"), "--data", str(place / "rows"), "--out", str(out), *SETTINGS, *more]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_several_ranks_make_the_updates_of_one(place, tmp_path):
    one, several = (start(place, tmp_path / str(ranks), ranks) for ranks in (1, RANKS))
    assert one.returncode == several.returncode == 0, several.stderr
    for place_of_one in sorted((tmp_path / "1").rglob("*")):
        assert (tmp_path / str(RANKS) / place_of_one.relative_to(tmp_path / "1")).exists()
    assert not list((tmp_path / str(RANKS)).glob("*.part"))
    assert (tmp_path / "1/augment/train.tsv").read_bytes() == (tmp_path / f"{RANKS}/augment/train.tsv").read_bytes()
    for name in ("teacher", "layers", "student"):
        begun = {"teacher": place / "teacher", "layers": place / "student", "student": tmp_path / "1" / "layers"}[name]
        before = {f"bert.{key.removeprefix('bert.')}": value for key, value in load_file(begun / "model.safetensors").items()}
        a, b = (load_file(tmp_path / ranks / name / "model.safetensors") for ranks in ("1", str(RANKS)))
        apart = max((a[key] - b[key]).abs().max().item() for key in a)
        moved = max((a[key] - value).abs().max().item() for key, value in before.items() if key in a)
        # Float32 rounding of gradients that are summed in another order; a rank that learned from its own rows alone, or a
        # sum in the place of the mean, would be as far apart as the training moved.
        assert apart < 1e-5 < 1e-3 < moved, (name, apart, moved)
        losses = [[line["loss"] for line in json.loads((tmp_path / ranks / name / "stage.json").read_text())["figures"]["epochs"]]
                  for ranks in ("1", str(RANKS))]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    said = several.stdout.splitlines()
    assert sum("teacher: makes" in line for line in said) == 1 and sum(line.startswith("The student is ") for line in said) == 1


@pytest.mark.parametrize("wrong, says", [
    (["min_teacher=1"], "is below min_teacher=1.0"), (["--columns", "question,text,label"], "no column 'text'")])
def test_an_error_is_said_once_and_ends_all_ranks(place, tmp_path, wrong, says):
    """Also where the first rank, the slowest here, comes to it last."""
    ended = start(place, tmp_path / "out", 2, *wrong)
    assert ended.returncode != 0
    said = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and says in said[0], ended.stderr
