"""The objective against a float64 computation that builds every score, and its invariants."""

import pytest
import torch

from pretrain.objective import (TERMS, TILE, Trace, distil, layer_map, named_terms, one_layer_each, relation_kl,
                                score_mse, term_weights, weighted)
from pretrain.recipe import KINDS as ALL_KINDS

KINDS = ALL_KINDS[:-2]  # of layers and embeddings, not of words
LENGTHS = (7, 12, 1, 5)  # ragged, one row of a single token


def changed(x: Trace, change) -> Trace:
    return Trace(*(tuple(change(part) for part in parts) for parts in (x.hidden, x.queries, x.keys, x.values)))


def made(layers: int, width: int, heads: int, d: int, seed: int, length: int = 12) -> Trace:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(len(LENGTHS), *shape, generator=g)

    scores = [tuple(draw(heads, length, d) for _ in range(layers)) for _ in "qkv"]
    return Trace(tuple(draw(length, width) for _ in range(layers + 1)), *scores)


def real(length: int = 12) -> torch.Tensor:
    return torch.arange(length)[None, :] < torch.tensor(LENGTHS)[:, None]


def direct_scores(s: Trace, t: Trace, m: int, n: int, mask: torch.Tensor) -> torch.Tensor:
    """Every score of both models in float64, masked by real pairs, averaged row by row."""
    def scores(x, i):
        q, k = x.queries[i].double(), x.keys[i].double()
        return q @ k.mT / q.shape[-1] ** 0.5

    pairs = mask[:, None, :, None] & mask[:, None, None, :]
    squares = (scores(s, m) - scores(t, n)) ** 2 * pairs
    return squares.sum((1, 2, 3)) / (pairs.sum((1, 2, 3)) * s.queries[m].shape[1])


@pytest.mark.parametrize("d_s, d_t", [(8, 8), (5, 8), (8, 5)])
def test_scores_are_those_of_the_direct_form(d_s, d_t):
    s, t, mask = made(1, 10, 3, d_s, 1), made(1, 10, 3, d_t, 2), real()
    got = score_mse(s.queries[0], s.keys[0], t.queries[0], t.keys[0], mask, mask).double()
    # float32 products of about d terms each: 1e-6 of the sums |S_s|^2 + |S_t|^2 that the form is built of
    size = sum(((x.queries[0].double() @ x.keys[0].double().mT) ** 2 / x.queries[0].shape[-1]).mean((1, 2, 3)) for x in (s, t))
    want = direct_scores(s, t, 0, 0, mask)
    assert ((got - want).abs() <= 1e-6 * size * (12 / torch.tensor(LENGTHS)) ** 2).all()


def test_gradients_are_those_of_the_direct_form():
    s, t, mask = made(1, 10, 3, 8, 1), made(1, 10, 3, 8, 2), real()
    s32 = changed(s, lambda x: x.clone().requires_grad_())
    s64 = changed(s, lambda x: x.double().requires_grad_())
    score_mse(s32.queries[0], s32.keys[0], t.queries[0], t.keys[0], mask, mask).sum().backward()
    direct_scores(s64, t, 0, 0, mask).sum().backward()
    for a, b in ((s32.queries[0], s64.queries[0]), (s32.keys[0], s64.keys[0])):
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=0, atol=1e-5 * b.grad.abs().max().item())


def test_equal_models_have_exactly_no_loss_and_no_gradient():
    s = changed(made(2, 10, 3, 8, 1), lambda x: x.requires_grad_())
    t = changed(s, lambda x: x.detach().clone())
    loss = weighted(distil(s, t, real(), [1, 2]), dict.fromkeys(TERMS, 1.0)).sum()
    loss.backward()
    assert loss.item() == 0.0
    assert all((x.grad is None) or (x.grad == 0).all() for part in (s.hidden, s.queries, s.keys) for x in part)
    assert all((value == 0).all() for value in distil(s, t, real(), [1, 2], ("qk", "qq", "kk", "vv")).values())


def test_models_close_to_each_other_keep_six_digits():
    t, mask = made(1, 10, 3, 8, 2), real()
    g = torch.Generator().manual_seed(5)
    s = changed(t, lambda x: x * (1 + 1e-4 * torch.randn(x.shape, generator=g)))
    got = score_mse(s.queries[0], s.keys[0], t.queries[0], t.keys[0], mask, mask).double()
    torch.testing.assert_close(got, direct_scores(s, t, 0, 0, mask), rtol=1e-6, atol=0)


def test_hidden_is_a_mean_over_real_tokens():
    s, t, mask = made(1, 10, 3, 8, 1), made(1, 10, 3, 8, 2), real()
    want = torch.stack([((s.hidden[0][i, :n].double() - t.hidden[0][i, :n].double()) ** 2).mean()
                        for i, n in enumerate(LENGTHS)])
    torch.testing.assert_close(distil(s, t, mask, [1])["embedding"].double(), want, rtol=1e-6, atol=0)


def test_what_stands_on_padding_never_reaches_the_loss():
    s, t, mask = made(2, 10, 3, 8, 1), made(2, 10, 3, 8, 2), real()
    before = distil(s, t, mask, [1, 2], KINDS)
    spoil = torch.where(mask, 0.0, 1e6)
    s2 = changed(s, lambda x: x + (spoil[:, :, None] if x.dim() == 3 else spoil[:, None, :, None]))
    after = distil(s2, t, mask, [1, 2], KINDS)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("how", ["more padding", "one row at a time", "another order"])
def test_a_row_counts_the_same_in_any_batch(how):
    s, t, mask = made(2, 10, 3, 8, 1), made(2, 10, 3, 8, 2), real()
    whole = distil(s, t, mask, [1, 2], KINDS)
    order = torch.tensor([2, 0, 3, 1])
    if how == "more padding":
        def longer(x):
            return torch.cat([x, torch.ones_like(x)], dim=-2)
        longer_mask = torch.cat([mask, torch.zeros_like(mask)], 1)
        other = distil(changed(s, longer), changed(t, longer), longer_mask, [1, 2], KINDS)
    elif how == "one row at a time":
        rows = [distil(changed(s, lambda x, i=i: x[i:i + 1]), changed(t, lambda x, i=i: x[i:i + 1]), mask[i:i + 1], [1, 2], KINDS)
                for i in range(len(LENGTHS))]
        other = {name: torch.cat([row[name] for row in rows]) for name in whole}
    else:
        back = torch.argsort(order)
        moved = distil(changed(s, lambda x: x[order]), changed(t, lambda x: x[order]), mask[order], [1, 2], KINDS)
        other = {name: value[back] for name, value in moved.items()}
    for name in whole:  # only the order of float32 sums may differ
        torch.testing.assert_close(whole[name], other[name], rtol=1e-5, atol=0)


def test_a_hand_sum():
    """One head, two tokens, d=1: S_s = [[1,2],[2,4]], S_t = 0, so the mean square is (1+4+4+16)/4."""
    q = torch.tensor([[[[1.0], [2.0]]]])
    zero = torch.zeros_like(q)
    real = torch.ones(1, 2, dtype=torch.bool)
    assert score_mse(q, q, zero, zero, real, real).item() == 6.25


def test_layer_maps():
    assert layer_map("uniform", 4, 12) == [3, 6, 9, 12]  # TinyBERT's own
    assert layer_map("uniform", 4, 6) == [2, 3, 5, 6]
    assert layer_map("last", 4, 6) == [3, 4, 5, 6]
    assert layer_map("first", 4, 6) == [1, 2, 3, 4]
    for n in range(1, 25):
        for m in range(1, n + 1):
            chosen = layer_map("uniform", m, n)
            assert chosen == sorted(set(chosen)) and chosen[-1] == n
            assert n % m or chosen == [n // m * i for i in range(1, m + 1)]


def test_groups_are_read_and_faults_are_said():
    assert layer_map("1:3-5,2:6-8,3:9-11,4:12", 4, 12) == [(3, 4, 5), (6, 7, 8), (9, 10, 11), (12,)]
    assert layer_map("3:2", 3, 2) == [(), (), (2,)]  # deeper than its teacher, but only the last layer imitates one
    assert one_layer_each([(3, 4), (), (12,)], 12) == [4, 8, 12] and one_layer_each([2, 4], 4) == [2, 4]
    for wrong in ("1:3-5,1:6", "5:1", "1:13", "1:4-3", "1:0", "1:", "1:2,", "1:2;2:3"):
        with pytest.raises(ValueError, match=r"cannot use '.*'; write each student layer \(1 to 4\) once"):
            layer_map(wrong, 4, 12)


def direct(s: Trace, t: Trace, mask: torch.Tensor, groups: list, common: int | None, padded: bool = False) -> dict:
    """Every term in float64, row by row, every score built; `padded` as TinyBERT's code has it: keys masked, queries not."""
    def heads(part, row):
        every = part[row].double().transpose(0, 1).flatten(1)  # (L, H d)
        return every.unflatten(-1, (common or part.shape[1], -1)).transpose(0, 1)

    def products(x, first, second, i, row):
        a, b = heads(getattr(x, first)[i], row), heads(getattr(x, second)[i], row)
        return a @ b.mT / a.shape[-1] ** 0.5

    def pair(kind, m, n, row, length):
        counted = mask.shape[1] if padded else length
        if kind in ("embedding", "hidden", "cosine"):
            a, b = (x.hidden[i][row, :counted].double() for x, i in ((s, m), (t, n)))
            cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
            return (1 - cosine if kind == "cosine" else (a - b) ** 2).mean()
        first, second = {"attention": "qk"}.get(kind, kind)
        names = {"q": "queries", "k": "keys", "v": "values"}
        own, its = (products(x, names[first], names[second], i - 1, row)[:, :counted] for x, i in ((s, m), (t, n)))
        if kind == "attention":
            return (((own - its) ** 2) * mask[row]).sum() / own.shape[0] / counted**2
        log_s, log_t = (torch.log_softmax(x[:, :, :length], -1) for x in (own, its))
        return (log_t.exp() * (log_t - log_s)).sum(-1).mean()

    out = {}
    for name, (kind, m) in named_terms(groups, KINDS).items():
        assert name == (f"{kind}/{m}" if m else "embedding")
        chosen = [groups[m - 1]] if m and isinstance(groups[m - 1], int) else groups[m - 1] if m else [0]
        rows = [sum(pair(kind, m, n, row, length) for n in chosen) / len(chosen) for row, length in enumerate(LENGTHS)]
        out[name] = torch.stack(rows)
    return out


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("groups", [[1, 3], [(1, 2), (3,)], [(), (2, 3)]], ids=str)
@pytest.mark.parametrize("heads, of_s, of_t", [(None, (3, 8), (3, 8)), (6, (3, 8), (4, 6)), (2, (3, 8), (3, 4))], ids=str)
def test_every_term_and_map_is_the_direct_one(groups, heads, of_s, of_t, padded):
    s, t, mask = made(2, 10, *of_s, 1), made(3, 10, *of_t, 2), real()
    got = distil(s, t, mask, groups, KINDS, relation_heads=heads, padded=padded)
    want = direct(s, t, mask, groups, heads, padded)
    assert list(got) == list(want) == [*named_terms(groups, KINDS)]
    for name in want:  # scores are some tens squared: where the widths differ, 1e-6 of that
        torch.testing.assert_close(got[name].double(), want[name], rtol=2e-6, atol=1e-4 if "attention" in name else 2e-6)
    assert list(distil(s, t, mask, groups, ("hidden",), relation_heads=heads)) == [name for name in want if "hidden" in name]


def test_relations_of_long_rows_and_their_gradients_are_the_direct_ones():
    """More rows than a tile, the last one not full; and no tensor of L x L in either pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                self.most = max(self.most, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    length, g = 4 * TILE - 7, torch.Generator().manual_seed(3)
    sa, sb, ta, tb = (torch.randn(2, 3, length, d, generator=g) for d in (4, 4, 8, 8))
    mask = torch.arange(length) < torch.tensor([[length], [TILE + 5]])
    sa.requires_grad_(), sb.requires_grad_()
    with Largest() as watch:
        got = relation_kl(sa, sb, ta, tb, mask, mask)
        got.sum().backward()
    assert 0 < watch.most <= 2 * 3 * length * TILE < 2 * 3 * length * length / 3
    own = [x.detach().double().requires_grad_() for x in (sa, sb)]
    for row, n in enumerate((length, TILE + 5)):
        log_s, log_t = (torch.log_softmax(a[row, :, :n] @ b[row, :, :n].mT / a.shape[-1] ** 0.5, -1)
                        for a, b in (own, (ta.double(), tb.double())))
        want = (log_t.exp() * (log_t - log_s)).sum(-1).mean()
        torch.testing.assert_close(got[row].double(), want, rtol=1e-5, atol=0)
        want.backward()
    for mine, its in zip((sa, sb), own, strict=True):
        torch.testing.assert_close(mine.grad.double(), its.grad, rtol=0, atol=1e-5 * its.grad.abs().max().item())


def test_words_are_means_over_a_rows_masked_positions():
    g = torch.Generator().manual_seed(4)
    words, mask = torch.tensor([[0, 0, 2], [1, 4, 5], [3, 0, 7]]), torch.ones(3, 6, dtype=torch.bool)
    s, t = (torch.randn(3, 9, generator=g) for _ in "st")
    ce = -s.double().log_softmax(-1)[range(3), words[2]]
    soft_s, soft_t = ((x.double() / 2).log_softmax(-1) for x in (s, t))
    kl = (soft_t.exp() * (soft_t - soft_s)).sum(-1) * 4
    got = distil(*(Trace((), (), (), (), logits) for logits in (s, t)), mask, [], ALL_KINDS[-2:], temperature=2.0, words=words)
    assert list(got) == ["mlm", "soft_mlm"]
    for kind, each in (("mlm", ce), ("soft_mlm", kl)):
        want = torch.stack([each[:2].mean(), torch.zeros((), dtype=torch.double), each[2]])  # the middle row has none
        torch.testing.assert_close(got[kind].double(), want, rtol=1e-6, atol=1e-7)
    same = Trace((), (), (), (), s)
    assert not distil(same, same, mask, [], ["soft_mlm"], temperature=3.0, words=words)["soft_mlm"].any()
    weights = term_weights([1, 2], {"hidden": 1.0, "mlm": 0.5}, "0,3,4")  # words are of no layer
    assert weights == {"hidden/1": 3.0, "hidden/2": 4.0, "mlm": 0.5}


def test_bf16_inputs_lose_no_more_than_their_rounding():
    """The loss of bf16 tensors is the float32 loss of the same numbers, bit for bit: nothing is computed in 16 bit."""
    s, t = (changed(made(2, 10, 3, 8, seed), lambda x: x.bfloat16()) for seed in (1, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = distil(s, t, real(), [1, 2], KINDS)
    want = distil(changed(s, lambda x: x.float()), changed(t, lambda x: x.float()), real(), [1, 2], KINDS)
    assert all(torch.equal(got[name], want[name]) and got[name].dtype == torch.float32 for name in want)


def test_weights_are_by_kind():
    terms = {"embedding": torch.tensor([1.0]), "hidden/1": torch.tensor([10.0]), "attention/1": torch.tensor([100.0])}
    assert weighted(terms, {"embedding": 1.0, "hidden": 0.5, "attention": 2.0}).item() == 206.0


def test_balanced_terms_pull_by_their_shares_of_themselves():
    """Row by row; the least ones by a thousand times themselves, equal models by nothing at all."""
    g = torch.Generator().manual_seed(6)
    x = torch.randn(5, 3, generator=g, dtype=torch.double).requires_grad_()
    terms, weights = {"embedding": 1e-6 * (x**2).sum(1), "hidden/1": (x - 1).pow(4).mean(1)}, {"embedding": 2.0, "hidden": 0.5}
    (got,) = torch.autograd.grad(weighted(terms, weights, balanced=True).sum(), x, retain_graph=True)
    (of_each,) = zip(*(torch.autograd.grad(term.sum(), x) for term in terms.values()), strict=True)
    want = sum(w * grad / (term[:, None] + 1e-3) for w, grad, term in zip((2.0, 0.5), of_each, terms.values(), strict=True))
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)  # float64's rounding over some ten operations
    s = changed(made(2, 10, 3, 8, 1), lambda part: part.requires_grad_())
    t = changed(s, lambda part: part.detach().clone())
    loss = weighted(distil(s, t, real(), [1, 2]), dict.fromkeys(TERMS, 1.0), balanced=True).sum()
    loss.backward()
    assert loss.isfinite() and all((part.grad == 0).all() for part in (*s.hidden, *s.queries, *s.keys))


def test_weights_by_layer():
    kinds = {"embedding": 1.0, "hidden": 2.0, "attention": 3.0}
    assert term_weights([1, 2], kinds, "inverse") == {
        "embedding": 1.0, "hidden/1": 1.0, "hidden/2": 2 / 3, "attention/1": 1.5, "attention/2": 1.0}
    assert term_weights([1, 2], kinds, "0.5,1,.25") == {
        "embedding": 0.5, "hidden/1": 2.0, "hidden/2": 0.5, "attention/1": 3.0, "attention/2": 0.75}
    for rule in ("equal", "balanced"):
        assert term_weights([(), (3,)], kinds, rule) == {"embedding": 1.0, "hidden/2": 2.0, "attention/2": 3.0}
    for wrong in ("1,2", "eqaul", "1,2,-3", "1,2,.", ""):
        with pytest.raises(ValueError, match="there are equal, inverse, balanced, and 3 numbers .* such as 1,1,1"):
            term_weights([1, 2], kinds, wrong)
