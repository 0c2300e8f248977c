"""What TensorBoard shows: figures and pictures against references, and what a run's board holds."""

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.objective import Trace
from pretrain.pictures import attention, similarity

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
                                                      "data_wait", "memory_GB")}
    assert sorted(tags["scalars"])[:len(health)] == sorted(health)  # they come first
    assert {"2 terms/attention/2", "2 terms/embedding", "3 held-out rows/held_out/cosine/2",
            "3 held-out rows/held_out/hidden/1"} <= {*tags["scalars"]}
    for picture in ("attention", "similarity"):
        assert [event.step for event in board.Images(f"3 held-out rows/{picture}")] == [0, 3, 6]
    assert '"warmup": 0.1' in board.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    content = board.summary_metadata["_hparams_/experiment"].plugin_data.content
    assert b"weight_decay" in content and b"1 health/loss" in content
