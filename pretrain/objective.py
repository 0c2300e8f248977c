"""HEART: what "like the teacher" means.  Tensors only.

TinyBERT (arXiv 1909.10351, eq. 7 to 9) matches embeddings, hidden states and attention scores before the softmax.  The scores
are never built: with Q = [Q_s - Q_t, Q_t] and K = [K_s, K_s - K_t], with Gram matrices 2d square (exact, linear in L):

    Q_s K_s^T - Q_t K_t^T = Q K^T     and     sum (Q K^T)^2 = || Q K^T ||_F^2 = < Q^T Q , K^T K >

A row's loss is a mean over its own real tokens (or pairs of them), so it depends on no padding, micro batch or rank.
Letters: B rows, L positions, D features, H heads, d features of a head, P masked words, V ids.  s_: student's, t_: teacher's."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pretrain.recipe import did_you_mean

TERMS = ("embedding", "hidden", "attention")  # TinyBERT's
RELATIONS = {"qk": ("queries", "keys"), "qq": ("queries",) * 2, "kk": ("keys",) * 2, "vv": ("values",) * 2}  # MiniLM's
OF_HEADS = ("attention", *RELATIONS)
OF_WORDS = ("mlm", "soft_mlm")  # these are of no layer
TILE = 64  # queries whose relations are computed at once
EPSILON = 1e-3  # added to balanced terms before their logarithm (arXiv 2308.12029): none counts more than 1,000 times


@dataclass(frozen=True)
class Trace:
    """What one encoder computed.  hidden[0] is the embedding output, hidden[i] the output of layer i."""
    hidden: tuple[Tensor, ...]  # layers + 1 of (B, L, D)
    queries: tuple[Tensor, ...]  # layers of (B, H, L, d), projected, not scaled
    keys: tuple[Tensor, ...]  # layers of (B, H, L, d)
    values: tuple[Tensor, ...]  # layers of (B, H, L, d)
    logits: Tensor | None = None  # (P, V), where masked words are asked for


def score_mse(sq: Tensor, sk: Tensor, tq: Tensor, tk: Tensor, real_BL: Tensor, counted_BL: Tensor) -> Tensor:
    """Mean squared difference of scores QK^T/sqrt(d) over heads and a row's pairs (eq. 7); (B, H, L, any d) -> (B,) float32."""
    queries, keys = (mask_BL[:, None, :, None].float() for mask_BL in (counted_BL, real_BL))
    sq, sk, tq, tk = sq.float() * queries, sk.float() * keys, tq.float() * queries, tk.float() * keys
    s_width, t_width = sq.shape[-1], tq.shape[-1]
    if s_width == t_width:  # the form on differences: exact zero for equal models, six digits near them
        (q1, q2), (k1, k2), scale = (sq - tq, tq), (sk, sk - tk), 1 / s_width
    else:  # a difference of large sums: float32 error about 1e-7 (|S_s|^2 + |S_t|^2)
        (q1, q2), (k1, k2), scale = (sq * s_width**-0.5, tq * -(t_width**-0.5)), (sk, tk), 1.0
    pairs = ((1, q1, q1, k1, k1), (2, q1, q2, k1, k2), (1, q2, q2, k2, k2))  # the Gram matrices' blocks; off the diagonal twice
    total_BH = scale * sum(n * ((a.mT @ b) * (c.mT @ d)).sum((-1, -2)) for n, a, b, c, d in pairs)
    return total_BH.mean(-1) / counted_BL.sum(-1).float() ** 2


def _tile_kl(sa: Tensor, sb: Tensor, ta: Tensor, tb: Tensor, real_BL: Tensor, counted_BL: Tensor) -> Tensor:
    """KL(teacher || student) of softmax(A B^T / sqrt(d)) over a row's real keys, its sum over heads and some queries -> (B,)."""
    scores = (a.float() @ b.float().mT * a.shape[-1]**-0.5 for a, b in ((sa, sb), (ta, tb)))
    s_BHLL, t_BHLL = (x.masked_fill(~real_BL[:, None, None, :], -1e9).log_softmax(-1) for x in scores)  # finite: 0 * -1e9 is 0
    return (nn.functional.kl_div(s_BHLL, t_BHLL, reduction="none", log_target=True).sum((1, 3)) * counted_BL).sum(-1)


def relation_kl(sa: Tensor, sb: Tensor, ta: Tensor, tb: Tensor, real_BL: Tensor, counted_BL: Tensor) -> Tensor:
    """MiniLM's loss (arXiv 2002.10957, 2012.15828), a mean over heads and counted queries -> (B,); in tiles: linear in L."""
    tiles = zip(*(x.split(TILE, -2) for x in (sa, ta, counted_BL[:, None, :, None])))
    total = sum(checkpoint(_tile_kl, a, sb, t, tb, real_BL, counts[:, 0, :, 0], use_reentrant=False) for a, t, counts in tiles)
    return total / counted_BL.sum(-1) / sa.shape[1]


def layer_map(kind: str, student_layers: int, teacher_layers: int) -> list:
    """The teacher layer (from 1) that each student layer imitates; a tuple of them, maybe empty, with groups: `1:3-5,2:6-8`."""
    m_all, n = range(1, student_layers + 1), teacher_layers
    if ":" in kind:
        groups = dict.fromkeys(m_all, ())
        for part in kind.split(","):
            found = re.fullmatch(r"(\d+):(\d+)(?:-(\d+))?", part)
            m, low, high = (int(x or found[2]) for x in found.groups()) if found else (0, 0, 0)
            if groups.get(m) != () or not 1 <= low <= high <= n:
                raise ValueError(f"layer_map={kind!r}: cannot use {part!r}; write each student layer (1 to {student_layers}) "
                                 f"once, with teacher layers (1 to {n}), such as 1:1-2,2:{n}")
            groups[m] = tuple(range(low, high + 1))
        return list(groups.values())
    if student_layers > teacher_layers:
        raise ValueError(f"a student of {student_layers} layers is deeper than its teacher; write layers={n} or fewer")
    maps = {"uniform": [(2 * m * n + student_layers) // (2 * student_layers) for m in m_all],  # TinyBERT's; rounds half up
            "last": [n - student_layers + m for m in m_all], "first": list(m_all)}
    if kind not in maps:
        raise ValueError(f"layer_map={kind!r}{did_you_mean(kind, maps)} (there are {', '.join(maps)}, and groups: 1:3-5,2:6-8)")
    return maps[kind]


def one_layer_each(layers: list, teacher_layers: int) -> list[int]:
    """For copies: the last teacher layer of each student layer's group; the uniform map's where it has none."""
    uniform = layer_map("uniform", len(layers), teacher_layers)
    return [layer if isinstance(layer, int) else (other, *layer)[-1] for layer, other in zip(layers, uniform, strict=True)]


def named_terms(layers: list, kinds: Iterable[str]) -> dict[str, tuple[str, int]]:
    """The terms that `distil` gives, in its order, each with its kind and student layer: `embedding`, `hidden/1`, ..., `mlm`."""
    each, of_none = [m for m, layer in enumerate(layers, start=1) if layer != ()], ("embedding", *OF_WORDS)
    return {f"{kind}/{m}" if m else kind: (kind, m) for kind in kinds for m in ([0] if kind in of_none else each)}


def distil(student: Trace, teacher: Trace, real_BL: Tensor, layers: list, kinds: Iterable[str] = TERMS, *,
           relation_heads: int | None = None, padded: bool = False, temperature: float = 2.0,
           words: Tensor | None = None) -> dict[str, Tensor]:
    """Every term of the loss for each row -> (B,) float32, by the names of `named_terms`; those of words are means over a row's
    masked words (3, P: row, position, true id), 0 where there is none.

    `real_BL` is True on tokens.  With `relation_heads` both models' heads are joined and cut into so many, of any width (arXiv
    2012.15828).  `padded`: means over all positions of the rows as they are padded, as TinyBERT's code takes them."""
    counted_BL = torch.ones_like(real_BL) if padded else real_BL

    def heads(x: Trace, layer: int, part: str) -> Tensor:
        of_all = getattr(x, part)[layer - 1]
        return of_all.transpose(1, 2).flatten(2).unflatten(-1, (relation_heads or of_all.shape[1], -1)).transpose(1, 2)

    def pair(kind: str, m: int, n: int) -> Tensor:
        if kind not in OF_HEADS:
            s_BLD, t_BLD = student.hidden[m].float(), teacher.hidden[n].float()
            apart_BL = 1 - torch.cosine_similarity(s_BLD, t_BLD, -1) if kind == "cosine" else (s_BLD - t_BLD).square().mean(-1)
            return (apart_BL * counted_BL).sum(-1) / counted_BL.sum(-1)  # eq. 8 and 9; cosine: DistilBERT's (arXiv 1910.01108)
        names = RELATIONS.get(kind, RELATIONS["qk"])
        parts = [heads(x, layer, part) for x, layer in ((student, m), (teacher, n)) for part in names]
        return (score_mse if kind == "attention" else relation_kl)(*parts, real_BL, counted_BL)

    def of_words(kind: str) -> Tensor:
        s_PV, t_PV, at = student.logits.float(), teacher.logits, (words[0], words[1])
        if kind == "mlm":
            loss_P = nn.functional.cross_entropy(s_PV, words[2], reduction="none")
        else:  # KL(teacher || student), times T^2, which keeps the gradient's size (arXiv 1503.02531)
            log_s, log_t = ((x.float() / temperature).log_softmax(-1) for x in (s_PV, t_PV))
            loss_P = nn.functional.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1) * temperature**2
        loss_BL, count_BL = (x.new_zeros(real_BL.shape).index_put(at, x) for x in (loss_P, torch.ones_like(loss_P)))
        return loss_BL.sum(-1) / count_BL.sum(-1).clamp(min=1)

    def term(kind: str, m: int) -> Tensor:
        if kind in OF_WORDS:
            return of_words(kind)
        layer = [0, *layers][m]
        group = (layer,) if isinstance(layer, int) else layer
        return sum(pair(kind, m, n) for n in group) / len(group)
    with torch.autocast(real_BL.device.type, enabled=False):
        return {name: term(*of) for name, of in named_terms(layers, kinds).items()}


def weighted(terms: dict[str, Tensor], weights: dict, balanced: bool = False) -> Tensor:
    """The sum (B,) of terms, each with its own weight or its kind's; `balanced`: of their logarithms, whatever their scales."""
    each = {name: (x.relu() + EPSILON).log() if balanced else x for name, x in terms.items()}  # rounding can be below 0
    return torch.stack([weights.get(name, weights.get(name.partition("/")[0], 0.0)) * x for name, x in each.items()]).sum(0)


def term_weights(layers: list, kinds: dict[str, float], rule: str) -> dict[str, float]:
    """Each term's weight: its kind's times its layer's (1, by `inverse` 1/(m+1), or numbers, the embeddings' first)."""
    count = len(layers) + 1
    numbers = re.fullmatch(r"\d*\.?\d+(,\d*\.?\d+)*", rule) and [float(number) for number in rule.split(",")]
    inverse = rule == "inverse" and [1 / (m + 1) for m in range(count)]
    factors = [1.0] * count if rule in ("equal", "balanced") else inverse or numbers
    if not factors or len(factors) != count:
        raise ValueError(f"layer_weights={rule!r}: there are equal, inverse, balanced, and {count} numbers for this student, the "
                         f"embeddings' first, such as {','.join(['1'] * count)}")
    return {name: kinds[kind] * (kind in OF_WORDS or factors[m]) for name, (kind, m) in named_terms(layers, kinds).items()}
