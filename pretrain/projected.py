"""`init=projected`: a BERT teacher's embeddings and layers cut to a student's widths and fitted to what it computes on some rows.

Every state x (D) of the teacher stands as P^T x in the student, P (D, d) being the principal components of all states, turned at
random so that LayerNorm, which takes the mean and variance of features, finds features that are alike.  A head keeps the
directions that its scores, or what its values add, are made of; the intermediate layer keeps the neurons that add most.  Then
each matrix in turn is the ridge regression of its target on what the student itself computes up to there, so a layer also makes
up for the teacher's layers that were left out before it.

Letters: B rows, L positions, N tokens, H heads, D and d features of teacher and student, E and e of their heads."""

import torch
from torch import Tensor, nn

from pretrain.encoder import trace

RIDGE = 1e-2  # of the mean variance of what a target is regressed on


def _roots(x_HNE: Tensor) -> tuple[Tensor, Tensor]:
    """The square root of each head's second moments and its inverse, (H, E, E) both."""
    values, vectors = torch.linalg.eigh(x_HNE.mT @ x_HNE / x_HNE.shape[1])
    root = values.clamp(min=1e-6 * values.max().item()).sqrt()[:, None]
    return vectors * root @ vectors.mT, vectors / root @ vectors.mT


def _halves(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best factors A (H, m, rank), B (H, rank, n) of left @ right."""
    u, s, v = torch.linalg.svd(left @ right, full_matrices=False)
    s = s[:, None, :rank].sqrt()
    return u[:, :, :rank] * s, s.mT * v[:, :rank]


def _fit(linear: nn.Linear, x: Tensor, y: Tensor) -> Tensor:
    """Let a Linear be the ridge regression of y (N, out) on x (N, in) -> what it gives for x."""
    centred = x - x.mean(0)
    gram = centred.T @ centred
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    linear.weight.copy_(torch.linalg.solve(gram, centred.T @ (y - y.mean(0))).T)
    linear.bias.copy_(y.mean(0) - linear.weight @ x.mean(0))
    return linear(x)


def _fit_norm(norm: nn.LayerNorm, x: Tensor, y: Tensor) -> Tensor:
    """The same for a LayerNorm, feature by feature."""
    norm.reset_parameters()
    plain = norm(x)
    slope = ((plain - plain.mean(0)) * (y - y.mean(0))).mean(0) / plain.var(0, correction=0).clamp(min=1e-12)
    norm.weight.copy_(slope)
    norm.bias.copy_(y.mean(0) - slope * plain.mean(0))
    return norm(x)


def _heads(q: Tensor, k: Tensor, v: Tensor, out_HdE: Tensor, width: int) -> list[Tensor]:
    """Queries, keys, values (H, N, E) cut to `width` features a head, best for their scores and for what they add -> (N, d)."""
    if width < q.shape[-1]:
        (q_root, q_inverse), (k_root, k_inverse), (v_root, v_inverse) = map(_roots, (q, k, v))
        for_q, for_k = _halves(q_root, k_root, width)
        scale = (width / q.shape[-1]) ** 0.25  # scores are divided by the root of the head's width
        q, k = scale * (q @ q_inverse @ for_q), scale * (k @ k_inverse @ for_k.mT)
        v = v @ v_inverse @ _halves(out_HdE, v_root, width)[1].mT
    return [x.transpose(0, 1).flatten(1) for x in (q, k, v)]


@torch.no_grad()
def project(student: nn.Module, teacher: nn.Module, layers: list[int], ids: Tensor, segments: Tensor, real: Tensor) -> None:
    """Fit a Student in place, layer m to layer `layers[m - 1]` (from 1) of a float32 teacher; the turn is torch's generator's."""
    traced, encoder, mask = trace(teacher, ids, segments, real), student.encoder, real[:, None, None, :]
    width, states = encoder.config.hidden_size, torch.cat([traced.hidden[n][real] for n in (0, *layers)])
    p_Dd = torch.eye(width, device=states.device)
    if width < states.shape[1]:
        turn = torch.linalg.qr(torch.randn(width, width)).Q.to(states)
        p_Dd = torch.linalg.eigh(states.T @ states).eigenvectors.flip(1)[:, :width] @ turn
    for name, table in encoder.embeddings.named_children():
        if name.endswith("_embeddings"):
            table.weight.copy_(getattr(teacher.embeddings, name).weight @ p_Dd)
    summed = encoder.embeddings.word_embeddings(ids) + encoder.embeddings.token_type_embeddings(segments)
    summed = summed + encoder.embeddings.position_embeddings.weight[:ids.shape[1]]
    x = _fit_norm(encoder.embeddings.LayerNorm, summed[real], traced.hidden[0][real] @ p_Dd)
    for own, n in zip(encoder.encoder.layer, layers, strict=True):
        its, before = teacher.encoder.layer[n - 1], traced.hidden[n - 1]  # what the teacher computes, step by step
        attended = (its.attention.output.dense(its.attention.self(before, mask)[0]) + before)[real]
        between = its.attention.output.LayerNorm(attended)
        neurons, act = its.intermediate.dense(between), its.intermediate.intermediate_act_fn
        parts = [getattr(traced, part)[n - 1].transpose(1, 2)[real].transpose(0, 1) for part in ("queries", "keys", "values")]
        out_HdE = p_Dd.T @ its.attention.output.dense.weight.unflatten(1, (len(parts[0]), -1)).transpose(0, 1)
        mine = own.attention.self
        for linear, y in zip((mine.query, mine.key, mine.value), _heads(*parts, out_HdE, width // len(parts[0])), strict=True):
            _fit(linear, x, y)
        x_BLd = x.new_zeros(*real.shape, width).masked_scatter(real[..., None], x)
        x = x + _fit(own.attention.output.dense, mine(x_BLd, mask)[0][real], attended @ p_Dd - x)
        x = _fit_norm(own.attention.output.LayerNorm, x, between @ p_Dd)
        adds = act(neurons).var(0) * (p_Dd.T @ its.output.dense.weight).square().sum(0)
        kept = adds.argsort(descending=True)[:encoder.config.intermediate_size].sort().values
        inside = act(_fit(own.intermediate.dense, x, neurons[:, kept]))
        x = x + _fit(own.output.dense, inside, (its.output.dense(act(neurons)) + between) @ p_Dd - x)
        x = _fit_norm(own.output.LayerNorm, x, traced.hidden[n][real] @ p_Dd)
    for linear in student.projection.modules() if student.projection is not None else ():
        if isinstance(linear, nn.Linear):
            linear.weight.copy_(p_Dd)
            linear.bias.zero_()
