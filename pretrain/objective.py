"""HEART: what "like the teacher" means.  Tensors only.

TinyBERT (arXiv 1909.10351, eq. 7 to 9) matches embeddings, hidden states and attention scores before the
softmax.  The scores are never built: with Q = [Q_s - Q_t, Q_t] and K = [K_s, K_s - K_t],

    Q_s K_s^T - Q_t K_t^T = Q K^T     and     sum (Q K^T)^2 = || Q K^T ||_F^2 = < Q^T Q , K^T K >

where the Gram matrices are 2d square: exact, linear in L.  Every row counts the same: a row's loss is a mean over
its own real tokens (or pairs of them), so it depends on no padding, no micro batch and no rank.

Letters: B rows, L positions, D features, H heads, d features of a head.  s_ is the student's, t_ the teacher's.
"""

from typing import Protocol

import torch
from torch import Tensor

TERMS = ("embedding", "hidden", "attention")


class Traced(Protocol):
    """See pretrain.encoder.Trace: hidden states, and projected queries and keys, layer by layer."""

    hidden: tuple[Tensor, ...]
    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]


def hidden_mse(s_BLD: Tensor, t_BLD: Tensor, real_BL: Tensor) -> Tensor:
    """Mean squared difference over a row's real tokens and features (eq. 8 and 9) -> (B,) float32."""
    squares_BL = (s_BLD.float() - t_BLD.float()).square().mean(-1)
    return (squares_BL * real_BL).sum(-1) / real_BL.sum(-1)


def score_mse(sq: Tensor, sk: Tensor, tq: Tensor, tk: Tensor, real_BL: Tensor) -> Tensor:
    """Mean squared difference of scaled scores QK^T/sqrt(d) over heads and a row's real pairs (eq. 7) -> (B,) float32.

    Queries and keys are (B, H, L, d), not scaled; the two models have as many heads, of any two widths.
    """
    if sq.shape[1] != tq.shape[1]:
        raise ValueError(f"the student has {sq.shape[1]} heads, the teacher {tq.shape[1]}: scores cannot be compared")
    mask = real_BL[:, None, :, None].float()
    sq, sk, tq, tk = (x.float() * mask for x in (sq, sk, tq, tk))
    s_width, t_width = sq.shape[-1], tq.shape[-1]
    if s_width == t_width:  # the form on differences: exact zero for equal models, six digits near them
        q, k = torch.cat([sq - tq, tq], -1), torch.cat([sk, sk - tk], -1)
        total_BH = ((q.mT @ q) * (k.mT @ k)).sum((-1, -2)) / s_width
    else:  # a difference of large sums: float32 error about 1e-7 (|S_s|^2 + |S_t|^2)
        q, k = torch.cat([sq, -tq], -1), torch.cat([sk, tk], -1)
        scale = torch.cat([sq.new_full((s_width,), s_width**-0.5), sq.new_full((t_width,), t_width**-0.5)])
        total_BH = ((q.mT @ q) * (k.mT @ k) * (scale[:, None] * scale)).sum((-1, -2))
    return total_BH.mean(-1) / real_BL.sum(-1).float().square()


def layer_map(kind: str, student_layers: int, teacher_layers: int) -> list[int]:
    """The teacher layer (from 1) that each student layer imitates.

    `uniform` is TinyBERT's own map where M divides N and rounds half up elsewhere: 2, 3, 5, 6 for N=6, M=4.
    """
    m_all, n = range(1, student_layers + 1), teacher_layers
    if student_layers > teacher_layers:
        raise ValueError(f"a student of {student_layers} layers is deeper than its teacher of {teacher_layers}; "
                         f"write layers={teacher_layers} or fewer")
    if kind == "uniform":
        return [(2 * m * n + student_layers) // (2 * student_layers) for m in m_all]
    if kind == "last":
        return [n - student_layers + m for m in m_all]
    if kind == "first":
        return list(m_all)
    raise ValueError(f"layer_map={kind!r}: there are uniform, last, first")


def distil(student: Traced, teacher: Traced, real_BL: Tensor, layers: list[int]) -> dict[str, Tensor]:
    """Every term of the loss for each row: `embedding`, `hidden/1`, ..., `attention/1`, ... -> (B,) float32.

    `real_BL` is True on tokens; student's hidden states have the teacher's width (projected where they must be).
    """
    with torch.autocast(real_BL.device.type, enabled=False):
        terms = {"embedding": hidden_mse(student.hidden[0], teacher.hidden[0], real_BL)}
        for m, n in enumerate(layers, start=1):
            terms[f"hidden/{m}"] = hidden_mse(student.hidden[m], teacher.hidden[n], real_BL)
        for m, n in enumerate(layers, start=1):
            terms[f"attention/{m}"] = score_mse(student.queries[m - 1], student.keys[m - 1],
                                                teacher.queries[n - 1], teacher.keys[n - 1], real_BL)
    return terms


def weighted(terms: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The terms' sum (B,), each layer's term with the weight of its kind; TinyBERT's are all 1."""
    return torch.stack([weights[name.partition("/")[0]] * value for name, value in terms.items()]).sum(0)
