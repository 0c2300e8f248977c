"""How like its teacher a student is, on held-out rows: figures by layer, and pictures in which dark is much."""

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.objective import Trace, hidden_cosine

HEADS = 4  # whose attention is shown
TOKENS = 1024  # on which layers are compared


def _pairs(layers: list) -> list[tuple[int, int]]:
    """Each student layer and the last teacher layer that it imitates, where there is one."""
    return [(m, layer if isinstance(layer, int) else layer[-1]) for m, layer in enumerate(layers, start=1) if layer != ()]


def cosines(student: Trace, teacher: Trace, real_BL: Tensor, layers: list) -> dict[str, Tensor]:
    """A row's mean cosine of hidden states, each student layer against its teacher layer -> (B,) by name."""
    return {f"teacher_cosine/{m}": 1 - hidden_cosine(student.hidden[m], teacher.hidden[n], real_BL)
            for m, n in [(0, 0), *_pairs(layers)]}


def attention(student: Trace, teacher: Trace, real_BL: Tensor, layers: list) -> Tensor:
    """The first row's attention: a line for each student layer, in it for each head the teacher's, then the student's."""
    def maps(x: Trace, layer: int) -> Tensor:
        q, k = (part[layer - 1][0, :HEADS, real_BL[0]].float() for part in (x.queries, x.keys))
        p_HLL = (q @ k.mT * q.shape[-1]**-0.5).softmax(-1).sqrt()  # the root shows small ones too
        return F.pad(p_HLL / p_HLL.amax((1, 2), keepdim=True), (0, 1, 0, 1), value=1.0)

    pairs = [(maps(teacher, n), maps(student, m)) for m, n in _pairs(layers)]
    return 1 - torch.cat([torch.cat([one for heads in zip(*pair) for one in heads], 1) for pair in pairs])


def similarity(student: Trace, teacher: Trace, real_BL: Tensor) -> Tensor:
    """Linear CKA (arXiv 1905.00414) of every student layer (down) with every teacher layer, the embeddings first."""
    s_states, t_states = ([x[real_BL][:TOKENS].float() for x in traced.hidden] for traced in (student, teacher))
    s_states, t_states = ([x - x.mean(0) for x in states] for states in (s_states, t_states))
    s_norms, t_norms = ([(x.mT @ x).norm() for x in states] for states in (s_states, t_states))
    return 1 - torch.stack([torch.stack([(x.mT @ y).norm()**2 / (a * b) for y, b in zip(t_states, t_norms)])
                            for x, a in zip(s_states, s_norms)])
