"""How like its teacher a student is, on held-out rows: pictures in which dark is much."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.objective import Trace

HEADS = 4  # whose attention is shown
TOKENS = 1024  # on which layers are compared


def attention(student: Trace, teacher: Trace, real_BL: Tensor, layers: list) -> Tensor:
    """The first row's attention: a line for each student layer, in it for each head the teacher's, then the student's."""
    def maps(x: Trace, layer: int) -> Tensor:
        q, k = (part[layer - 1][0, :HEADS, real_BL[0]].float() for part in (x.queries, x.keys))
        p_HLL = (q @ k.mT * q.shape[-1]**-0.5).softmax(-1).sqrt()  # the root shows small ones too
        return F.pad(p_HLL / p_HLL.amax((1, 2), keepdim=True), (0, 1, 0, 1), value=1.0)

    pairs = [(maps(teacher, np.max(layer)), maps(student, m)) for m, layer in enumerate(layers, start=1) if layer != ()]
    return 1 - torch.cat([torch.cat([one for heads in zip(*pair) for one in heads], 1) for pair in pairs])


def similarity(student: Trace, teacher: Trace, real_BL: Tensor) -> Tensor:
    """Linear CKA (arXiv 1905.00414) of every student layer (down) with every teacher layer, the embeddings first."""
    s_states, t_states = ([x[real_BL][:TOKENS].float() for x in traced.hidden] for traced in (student, teacher))
    s_states, t_states = ([x - x.mean(0) for x in states] for states in (s_states, t_states))
    s_norms, t_norms = ([(x.mT @ x).norm() for x in states] for states in (s_states, t_states))
    return 1 - torch.stack([torch.stack([(x.mT @ y).norm()**2 / (a * b) for y, b in zip(t_states, t_norms)])
                            for x, a in zip(s_states, s_norms)])
