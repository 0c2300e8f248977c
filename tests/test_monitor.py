"""What TensorBoard shows: figures and pictures against references, and what a run's board holds."""

import json
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runs import ROOT, SMALL, metrics

from launch.budget import one_micro_batch
from pretrain.general import options
from pretrain.monitor import Window, attention, similarity
from pretrain.objective import Trace
from pretrain.plan import Plan

LAYERS = [2, 4]


def traced(layers: int, seed: int, width: int = 12) -> Trace:
    made = torch.Generator().manual_seed(seed)
    hidden = tuple(torch.randn(3, 10, width, generator=made) for _ in range(layers + 1))
    return Trace(hidden, *(tuple(torch.randn(3, 6, 10, 2, generator=made) for _ in range(layers)) for _ in range(3)))


@pytest.fixture
def real() -> torch.Tensor:
    return torch.arange(10) < torch.tensor([[7], [10], [4]])


def test_a_teacher_is_like_itself(real):
    teacher = traced(4, seed=0)
    torch.testing.assert_close(similarity(teacher, teacher, real).diagonal(), torch.zeros(5), atol=1e-5, rtol=0)


def test_similarity_is_linear_cka_of_the_real_tokens(real):
    """Against its definition by Gram matrices, in float64; padding may hold anything."""
    student, teacher = traced(2, seed=1), traced(4, seed=2, width=20)

    def gram(x) -> np.ndarray:
        x = x[real].double().numpy()
        x = (x - x.mean(0)) @ (x - x.mean(0)).T
        return x / np.linalg.norm(x)

    right = [[1 - (gram(x) * gram(y)).sum() for y in teacher.hidden] for x in student.hidden]
    for x in (*student.hidden, *teacher.hidden):
        x[~real] = 1e6
    np.testing.assert_allclose(similarity(student, teacher, real), right, atol=1e-5)


def test_attention_stands_head_beside_head(real):
    """Line m, column 2 h: head h of the teacher's layer; column 2 h + 1: the student's; each map's largest value is black."""
    student, teacher = traced(2, seed=1), traced(4, seed=2)
    picture = attention(student, teacher, real, LAYERS)
    assert picture.shape == (2 * 8, 8 * 8) and picture.min() == 0 and picture.max() < 1  # 7 tokens and a border
    for m, n in enumerate(LAYERS):
        for h in range(4):
            for column, (x, layer) in enumerate(((teacher, n - 1), (student, m))):
                q, k = (part[layer][0, h, :7].double() for part in (x.queries, x.keys))
                p = (q @ k.T / 2**0.5).softmax(-1)
                at = (2 * h + column) * 8
                got = picture[m * 8:m * 8 + 7, at:at + 7]
                torch.testing.assert_close((1 - got.double())**2, p / p.max(), atol=1e-5, rtol=1e-4)


def test_what_the_board_of_a_run_holds(one_rank):
    board = EventAccumulator(str(one_rank / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()
    tags = board.Tags()
    health = {tag for tag in tags["scalars"] if tag.startswith("1 health/")}
    assert health == {f"1 health/{name}" for name in ("loss", "held_out/loss", "grad_norm", "lr", "rows/s", "tokens/s",
                                                      "data_wait", "memory_GB", "matrix_rate", "time/teacher", "time/student",
                                                      "time/optimizer")}
    assert sorted(tags["scalars"])[:len(health)] == sorted(health)  # they come first
    assert {"2 terms/attention/2", "2 terms/embedding", "3 held-out rows/held_out/cosine/2",
            "3 held-out rows/held_out/hidden/1"} <= {*tags["scalars"]}
    for picture in ("attention", "similarity"):
        assert [event.step for event in board.Images(f"3 held-out rows/{picture}")] == [0, 3, 6]
    assert '"warmup": 0.1' in board.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    content = board.summary_metadata["_hparams_/experiment"].plugin_data.content
    assert b"weight_decay" in content and b"1 health/loss" in content


def test_shares_of_time_are_of_disjoint_parts(one_rank):
    for step, line in metrics(one_rank).items():
        shares = [line[name] for name in ("time/teacher", "time/student", "time/optimizer", "data_wait") if step]
        assert all(share > 0 for share in shares) and sum(shares) <= 1


def test_laps_are_summed_by_part_and_meaned_over_ranks():
    """The same two laps on each of two ranks; what lies between updates belongs to no part."""
    window, ranks = Window(), SimpleNamespace(device=torch.device("cpu"), world=2, total=lambda mine: Counter(
        {name: 2 * value for name, value in mine.items()}))
    window.laps = [("", 0.0), ("teacher", 1.0), ("student", 3.0), ("", 30.0), ("teacher", 31.0), ("student", 33.0)]
    window.tokens, window.begin = 100, window.begin - 100
    found = window.rates(ranks, 0.5)
    assert found["time/student"] == 2 * found["time/teacher"] and 0 < found["time/student"] < 4 / 100
    assert found["matrix_rate"] == pytest.approx(0.5 * found["tokens/s"] / 2, rel=1e-12) and "time/" not in found


def test_operations_are_those_of_the_first_update(inputs, tmp_path):
    """With a matrix rate of 1 a second: all products of real tokens at least, all of rows in full length at most."""
    code = ("import sys, pretrain.train; pretrain.train.matrix_rate = lambda *_: 1.0\n"
            "from pretrain.general import main; main(sys.argv[1:])")
    given = [*inputs, "--student", SMALL, "--out", str(tmp_path / "run"), "batch=16", "steps=1", "init=random"]
    done = subprocess.run([sys.executable, "-c", code, *given], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stderr
    line, (_, _, most) = metrics(tmp_path / "run")[1], one_micro_batch(Plan(options(given)), 16, 48)
    counted, tokens = line["matrix_rate"] / line["tokens/s"], line["tokens/s"] * 16 / line["rows/s"]
    teacher, student = 2 * 4 * (4 * 24**2 + 2 * 24 * 48), 2 * 2 * (4 * 12**2 + 2 * 12 * 24)  # a token's, forward; layers
    projection = 2 * 3 * 12 * 24
    assert teacher + 3 * (student + projection) <= counted <= most / tokens


def test_a_profile_is_written_of_the_steps_it_names(one_rank):
    [trace] = (one_rank / "tensorboard").glob("*.pt.trace.json")
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"] if "name" in event}
    assert {name for name in names if name.startswith("ProfilerStep#")} == {"ProfilerStep#2", "ProfilerStep#3"}
    assert "aten::addmm" in names
