"""`--dry-run`: what it says against runs, hand sums and the launcher."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, SMALL, launch

from launch.budget import budget, one_micro_batch
from pretrain.general import options
from pretrain.plan import Plan

MEASURED = """
import sys

def held(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024

import pretrain.engine, pretrain.plan, pretrain.train
import deepspeed, deepspeed.ops
from transformers import BertModel
from pretrain.general import main
before = held("VmRSS")
try:
    main(sys.argv[1:])
finally:
    print("above its imports", held("VmHWM") - before)
"""


def total(said: str) -> float:
    return float(re.search(r"([\d.]+) GB  at most in a step", said)[1]) * 1e9


@pytest.fixture(scope="module")
def wide(inputs, teacher_folder, tmp_path_factory) -> list[str]:
    """The options of a run under a teacher of MiniLM's shape, but for its vocabulary."""
    from transformers import BertConfig, BertModel

    folder = shutil.copytree(teacher_folder, tmp_path_factory.mktemp("wide") / "teacher")
    config = BertConfig.from_pretrained(folder, hidden_size=384, num_hidden_layers=6, intermediate_size=1536)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return [*inputs[:2], "--teacher", str(folder), "--teacher-dtype", "fp32", "init=random"]


@pytest.mark.parametrize("student, micro, batch", [("tiny4", 32, 64), ("tiny4:layers=3,hidden=192,intermediate=768", 96, 96)])
def test_memory_is_what_a_run_needs(student, micro, batch, wide, tmp_path):
    """Above what the process holds after its imports, within 15 %.

    glibc is told to return what is freed: by itself it keeps a part, in no rule that a formula could follow."""
    engine = tmp_path / "engine.json"
    engine.write_text(json.dumps({"train_micro_batch_size_per_gpu": micro, "zero_optimization": {"stage": 2}}))
    given = [*wide, "--student", student, "--engine", str(engine), "--out", str(tmp_path / "run"), f"batch={batch}", "steps=2"]
    done = subprocess.run([sys.executable, "-c", MEASURED, *given], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"})
    assert done.returncode == 0, done.stderr[-3000:]
    measured = int(done.stdout.split("above its imports ")[1])
    assert total(budget(options(given))) == pytest.approx(measured, rel=0.15)


def test_arithmetic_is_the_hand_sum(wide):
    """Every matrix product of a teacher's forward pass, a student's forward and backward, and the loss."""
    rows, length, layers = 4, 48, [2, 3, 5, 6]
    plan = Plan(options([*wide, "--student", "tiny4"]))
    _, _, flop = one_micro_batch(plan, rows, length)
    tokens = rows * length

    def linear(count: int, width: int, inner: int) -> int:
        return 2 * tokens * count * (4 * width**2 + 2 * width * inner)

    attention = 4 * rows * length**2  # Q K^T and its product with V, a feature
    projections = 2 * tokens * 312 * 384 * 5
    gram = 2 * tokens * 12 * (3 * 26**2 + 2 * 26 * 32 + 32**2) * 2 * len(layers)  # backward: twice its own block, once the mixed
    teacher = linear(6, 384, 1536) + attention * 6 * 384
    student = 3 * (linear(4, 312, 1200) + projections) + (1 + 2.5) * attention * 4 * 312  # flash computes scores again
    assert flop == teacher + student + gram


def test_what_it_says(inputs, tmp_path):
    """Everything resolved, for more GPUs than there are; no launcher, no run folder, nothing but one process."""
    given = [*inputs[:4], "--student", SMALL, "--gpus", "4", "--tflops", "0.001", "--out", tmp_path / "run", "batch=64",
             "steps=100"]
    done = subprocess.run(["bash", "launch/general.sh", "--dry-run", *map(str, given)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}, timeout=120)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    for part in ("steps=100, batch=64, lr=0.0001", "gpu-bf16.json: {", "'bf16': {'enabled': True}", "init=projected", "[2, 4]",
                 "batch 64 = 16 rows x 1 micro batches x 4 ranks", "in bf16", "/ 4 ranks", "buckets", "100 steps = "):
        assert part in said, part
    flop, hours, whole = (float(re.search(pattern, said)[1]) for pattern in
                          (r"([\d.e-]+) TFLOP a step", r"([\d.e-]+) hours", r"([\d.e-]+) GPU-hours"))
    assert whole == pytest.approx(4 * hours, rel=1e-3) and hours == pytest.approx(flop * 100 / 0.004 / 3600, rel=1e-3)
    assert not (tmp_path / "run").exists()


def test_ranks_share_the_optimizer_and_activations_follow_rows(wide):
    def parts(*more) -> list[float]:
        said = budget(options([*wide, "--student", "tiny4", "--engine", str(ROOT / "ds_configs/cpu.json"), *more]))
        return [float(size) for size in re.findall(r"([\d.]+) GB  (?!at most)", said)]

    one, four = parts("--gpus", "1", "batch=32"), parts("--gpus", "4", "batch=128")
    assert one[:2] == four[:2] and one[4:] == four[4:]
    assert one[2:4] == [pytest.approx(4 * size, abs=2e-3) for size in four[2:4]]  # three digits are said
    plan = Plan(options([*wide, "--student", "tiny4"]))
    few, more, most = (one_micro_batch(plan, rows, 48)[1] for rows in (32, 64, 128))
    assert most - more == pytest.approx(2 * (more - few), rel=0.01)  # but for gradients, at the peak or not


@pytest.mark.parametrize("more, says", [
    (["batch=10", "--gpus", "4"], "lanes=10 do not divide over 4 ranks"),
    (["batch=96", "--gpus", "2", "--engine", str(ROOT / "ds_configs/cpu.json")], "no multiple of the engine file's"),
])
def test_what_would_fail_on_the_cluster_fails_here(more, says, inputs):
    with pytest.raises(ValueError, match=says):
        budget(options([*inputs, "--student", SMALL, *more]))


def test_gpu_files_and_dropout_and_checkpointing_are_planned_without_a_gpu(inputs):
    gpu = ["--gpus", "2", "--engine"]
    assert "in fp16" in budget(options([*inputs, *gpu, str(ROOT / "ds_configs/gpu-fp16.json"), "dropout=0.1"]))
    said = budget(options([*inputs, *gpu, str(ROOT / "ds_configs/gpu-bf16-offload.json"), "gradient_checkpointing=true", "qk=1"]))
    assert "0.000 GB  ZeRO: " in said
    plain, heads = (budget(options([*inputs, *gpu, str(ROOT / "ds_configs/gpu-bf16.json"), *terms]))
                    for terms in ([], ["mlm=1", "soft_mlm=1"]))
    for counted in ("teacher", "students"):  # the heads are weights too
        more, few = (int(re.search(rf"{counted}: ([\d,]+) parameters", said)[1].replace(",", "")) for said in (heads, plain))
        assert more > few
    assert total(heads) > total(plain)
    assert torch.get_default_dtype() == torch.float32


def test_a_run_says_no_dry_thing(inputs, tmp_path):
    assert "error: " in launch(*inputs, "--student", "tiny9", "--dry-run", "--out", tmp_path / "run", expect=2)
