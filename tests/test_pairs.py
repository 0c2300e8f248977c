"""Rows and masks, by property: every sentence is used once, segments are what they say, masks keep their budget."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.block import BLOCK_ROWS
from shards.pairs import _random_segments, _words_within, cut_document, cut_documents, draw_rows, make_blocks, masked, words
from shards.store import Store
from shards.tokenizer import Vocabulary

SIZE = 1000  # ids 0-4 special, 5-9 unused, from 700 on word pieces that continue


def vocabulary() -> Vocabulary:
    number = np.arange(SIZE)
    return Vocabulary(name="made here", json="", size=SIZE, pad=0, cls=2, sep=3, mask=4, unk=None, fingerprint="",
                      special=number < 5, begins_word=number < 700, may_replace=number >= 10)


def generator(*seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(list(seed)))


def store_of(ids, sentences, documents, copies=None) -> Store:
    sizes = np.diff(documents)
    places = np.concatenate([[0], np.cumsum(sizes * (np.ones_like(sizes) if copies is None else copies))])
    return Store(ids, np.array(sentences), np.array(documents), places)


def made_store(documents: int, seed: int = 0, longest: int = 60, copies=None) -> Store:
    """Sentences of 1 to `longest` tokens, documents of 1 to 30 sentences."""
    rng = generator(seed)
    sizes = rng.integers(1, 31, size=documents)
    lengths = rng.integers(1, longest + 1, size=sizes.sum())
    ids = rng.integers(10, SIZE, size=lengths.sum()).astype(np.uint16)
    return store_of(ids, np.concatenate([[0], np.cumsum(lengths)]), np.concatenate([[0], np.cumsum(sizes)]), copies)


def rows_between(store, first, last, row_length, one_segment, seed) -> SimpleNamespace:
    """All rows of some documents, as blocks take them."""
    rng, capacity = generator(*np.atleast_1d(seed).tolist()), row_length - (2 if one_segment else 3)
    table = cut_documents(store, first, last, capacity, one_segment, rng)
    drawn = [draw_rows(store, table[at:at + BLOCK_ROWS], capacity, rng) for at in range(0, len(table), BLOCK_ROWS)]
    spans, truncated = (np.concatenate(parts, axis=-1) for parts in zip(*drawn, strict=True))
    return SimpleNamespace(**dict(zip(("a_start", "a_end", "b_start", "b_end"), spans, strict=True)), truncated=truncated,
                           is_random=table[:, 5] > 0, several=table[:, 3] - table[:, 1] > 1)


def blocks_of(store, *seed, first=0, last=None, counts=None, **settings):
    last = len(store.documents) - 1 if last is None else last
    settings = SimpleNamespace(**{"row_length": 128, "one_segment": False, "mask_sets": 2, "masking": "whole-word"} | settings)
    return list(make_blocks(store, first, last, vocabulary(), settings, generator(0, *seed), generator(1, *seed),
                            Counter() if counts is None else counts))


def rows_of(block):
    """(ids, first, is_random) of each row of a block."""
    for ids, first, is_random in zip(np.split(block.ids, np.cumsum(block.lengths.astype(int))[:-1]), block.first,
                                     block.is_random, strict=True):
        yield ids.tolist(), int(first), bool(is_random)


LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@given(LENGTHS, st.integers(5, 253), st.sampled_from(["any", "next", "none"]), st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_every_sentence_is_used_exactly_once(lengths, capacity, second, seed):
    ends = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    rows = cut_document(ends, capacity, second, generator(seed))
    used = []
    for i, a, j, target, is_random in rows:
        assert i < a <= j and 2 <= target <= capacity
        assert is_random is (second == "any") or j - i > 1
        assert j == len(lengths) or ends[j] - ends[i] >= target  # the chunk fills the target
        assert j - i == 1 or ends[j - 1] - ends[i] < target  # with no sentence too many
        used += range(i, a if is_random else j)
    assert used == list(range(len(lengths)))


def test_target_is_drawn_for_each_row():
    rows = cut_document(list(range(0, 200_001, 5)), 125, "next", generator(1))
    short = np.array([target < 125 for _, _, _, target, _ in rows])
    assert abs(short.mean() - 0.1) < 0.03 and len(rows) > 1500


def test_a_random_second_segment_comes_from_half_of_the_chunks_that_can_have_a_true_one():
    store = made_store(400)
    rows = [row for d in range(400) for row in cut_document(
        store.sentences[store.documents[d]:store.documents[d + 1] + 1].tolist(), 125, "any", generator(2, d))]
    several = [is_random for i, _, j, _, is_random in rows if j - i > 1]
    single = [is_random for i, _, j, _, is_random in rows if j - i == 1]
    assert abs(np.mean(several) - 0.5) < 0.03 and len(single) > 20 and all(single)


@given(st.integers(0, 10**6), st.sampled_from([16, 64, 128, 300]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_segments_are_slices_of_the_right_documents(seed, row_length, one_segment):
    store = made_store(12, seed)
    rows = rows_between(store, 2, 6, row_length, one_segment, seed)
    of_token = np.repeat(np.arange(12), np.diff(store.sentences[store.documents]))
    a, b = rows.a_end - rows.a_start, rows.b_end - rows.b_start
    assert (a > 0).all() and (a + b + np.where(b > 0, 3, 2) <= row_length).all()
    assert ((b == 0) == one_segment).all()
    assert set(of_token[rows.a_start]) == {2, 3, 4, 5} and (of_token[rows.a_start] == of_token[rows.a_end - 1]).all()
    if not one_segment:
        other = of_token[rows.b_start]
        assert (other == of_token[rows.b_end - 1]).all()
        assert ((other != of_token[rows.a_start]) == rows.is_random).all()
        true = ~rows.is_random
        assert rows.several[true].all() and (rows.b_start[true] >= rows.a_end[true]).all()
        assert (rows.b_start == rows.a_end)[true & (rows.truncated == 0)].all()
    tokens = np.diff(store.sentences[store.documents])[2:6].sum()
    own = (a + np.where(rows.is_random, 0, b)).sum()
    assert own <= tokens <= own + rows.truncated.sum()  # nothing is lost that is not counted


def test_random_segments_start_evenly_at_every_copy_of_every_sentence_of_other_documents():
    copies = np.array([1, 1, 3, 1, 2, 1, 1, 1, 2, 1])
    store = made_store(10, copies=copies)
    start, end = _random_segments(store, np.full(40_000, 4), np.full(40_000, 50), generator(0))
    first, last = np.searchsorted(store.sentences, start), np.searchsorted(store.sentences, end)
    seen = np.bincount(first, minlength=store.documents[-1])
    of_sentence = np.repeat(np.arange(10), np.diff(store.documents))
    assert seen[of_sentence == 4].sum() == 0  # never the own document, in none of its copies
    each = (seen / copies[of_sentence])[of_sentence != 4]
    assert abs(each / each.mean() - 1).max() < 0.4
    document_end = store.documents[1:][np.searchsorted(store.documents, first, "right") - 1]
    assert ((end - start >= 50) | (last == document_end)).all() and (last > first).all()
    assert (store.sentences[last - 1] - start < 50).all()  # no sentence too many


def test_a_copy_is_the_document_again_with_draws_of_its_own():
    once, thrice = made_store(5, longest=9), made_store(5, longest=9, copies=np.array([1, 1, 3, 1, 1]))
    tables = [cut_documents(store, 0, 5, 40, False, generator(3)) for store in (once, thrice)]
    assert [len(set(table[:, 0])) for table in tables] == [5, 5]
    _, first, a, j, _, is_random = tables[1][tables[1][:, 0] == 2].T
    used = np.concatenate([np.arange(i, end) for i, end in zip(first, np.where(is_random, a, j), strict=True)])
    assert (np.bincount(used - store_first(thrice, 2)) == 3).all()  # every sentence three times
    begins = np.flatnonzero(first == store_first(thrice, 2))
    parts = [tuple(map(tuple, part[:, 2:])) for part in np.split(tables[1][tables[1][:, 0] == 2], begins[1:])]
    assert len(parts) == 3 and len(set(parts)) > 1


def store_first(store, document):
    return int(store.documents[document])


@given(st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_blocks_are_full_but_the_last_and_hold_all_rows_in_order(documents, seed):
    store = made_store(documents, seed, longest=8)
    table = cut_documents(store, 0, documents, 20, False, generator(0, seed))
    assert (np.diff(table[:, 0]) >= 0).all() and set(table[:, 0]) == set(range(documents))
    blocks = blocks_of(store, seed, row_length=23)
    sizes = [len(block.lengths) for block in blocks]
    assert all(size == BLOCK_ROWS for size in sizes[:-1]) and sum(sizes) == len(table)
    assert (np.concatenate([block.is_random for block in blocks]) == table[:, 5]).all()


def test_truncation_takes_from_the_longer_segment_until_they_are_even():
    store = store_of(np.arange(400, dtype=np.uint16), [0, 300, 330, 400], [0, 2, 3])
    for n in range(50):
        rows = rows_between(store, 0, 1, 43, False, n)
        a, b = rows.a_end[0] - rows.a_start[0], rows.b_end[0] - rows.b_start[0]
        assert a + b <= 40 and (a, b) in {(20, 20)}  # both longer than their half: cut to 20 and 20
        assert rows.truncated[0] in (300 + 30 - 40, 300 + 70 - 40)


def test_a_store_of_one_document_has_true_pairs_only():
    assert not rows_between(made_store(1, seed=3), 0, 1, 128, False, 0).is_random.any()
    block, = blocks_of(store_of(np.arange(100, 108, dtype=np.uint16), [0, 8], [0, 1]))
    assert list(rows_of(block)) == [([2, *range(100, 108), 3], 10, False)]


@pytest.mark.parametrize("one_segment", [False, True])
def test_rows_are_cls_a_sep_b_sep(one_segment):
    store = made_store(40)
    rows = rows_between(store, 0, 40, 128, one_segment, (0, 7))
    found = [row for block in blocks_of(store, 7, one_segment=one_segment) for row in rows_of(block)]
    assert len(found) == len(rows.a_start)
    for n, (ids, first, is_random) in enumerate(found):
        a = store.ids[rows.a_start[n]:rows.a_end[n]].tolist()
        b = store.ids[rows.b_start[n]:rows.b_end[n]].tolist()
        assert ids == ([2, *a, 3] if one_segment else [2, *a, 3, *b, 3])
        assert first == len(a) + 2 and is_random == rows.is_random[n]


def block_of(lengths, seed):
    """Flat rows [CLS] ... [SEP] of random ids, word pieces among them."""
    ids = generator(seed).integers(10, SIZE, size=sum(lengths)).astype(np.uint16)
    begin = np.cumsum(lengths) - lengths
    ids[begin], ids[begin + np.array(lengths) - 1] = 2, 3
    return ids, np.array(lengths)


def words_of(row):
    """Position lists of the words of one row."""
    words, v = [], vocabulary()
    for position, number in enumerate(row):
        if v.special[number]:
            continue
        if v.begins_word[number] or v.special[row[position - 1]]:
            words.append([])
        words[-1].append(position)
    return words


def drawn(rng):
    return lambda purpose, places: rng.integers(2**32, size=len(places), dtype=np.uint32)


@given(st.lists(st.integers(3, 140), min_size=1, max_size=30), st.integers(0, 10**6), st.booleans(),
       st.sampled_from([8, 40, 128, 300]))
@settings(max_examples=150, deadline=None)
def test_masks_keep_their_budget_and_words_whole(lengths, seed, whole_word, row_length):
    ids, lengths = block_of(lengths, seed)
    v = vocabulary()
    found = words(ids, lengths, v, whole_word)
    counts, positions, new = masked(found, ids, lengths, v, drawn(generator(seed)), row_length)
    assert counts.sum() == len(positions) == len(new)
    begin, at = np.cumsum(lengths) - lengths, np.split(positions, np.cumsum(counts)[:-1])
    flat = np.repeat(begin, counts) + positions
    assert not v.special[ids[flat]].any()
    assert ((new == v.mask) | (new == ids[flat]) | v.may_replace[new]).all()
    for start, length, taken in zip(begin, lengths, at, strict=True):
        budget = min(round(0.16 * row_length), max(1, round(float(length * 0.15))))
        by_hand = words_of(ids[start:start + length]) if whole_word else [[p] for p in range(1, length - 1)]
        assert sorted(set(taken.tolist())) == taken.tolist() and len(taken) <= budget
        whole = [word for word in by_hand if set(word) <= set(taken.tolist())]
        assert sum(map(len, whole)) == len(taken)
        # Greedy to the end: no word left out would still fit.
        assert not any(len(word) <= budget - len(taken) for word in by_hand if word not in whole)


def test_mask_rates_are_80_10_10_and_every_position_has_its_chance():
    ids, lengths = block_of([128] * 512, 5)
    v = vocabulary()
    sets = [masked(words(ids, lengths, v, False), ids, lengths, v, drawn(generator(n)), 128) for n in range(20)]
    new = np.concatenate([new for _, _, new in sets])
    flat = np.concatenate([np.repeat(np.arange(512) * 128, counts) + positions for counts, positions, _ in sets])
    assert len(new) == 20 * 512 * 19  # round(128 * 0.15)
    is_mask, same = new == v.mask, new == ids[flat]
    assert abs(is_mask.mean() - 0.8) < 0.005 and abs(same.mean() - 0.1) < 0.005
    replaced = new[~is_mask & ~same]
    assert replaced.min() >= 10 and len(np.unique(replaced)) == SIZE - 10
    seen = np.bincount(flat % 128, minlength=128)
    assert seen[[0, 127]].sum() == 0 and abs(seen[1:127] / seen[1:127].mean() - 1).max() < 0.15
    shared = np.intersect1d(flat[:len(sets[0][1])], flat[-len(sets[-1][1]):])
    assert abs(len(shared) / len(sets[0][1]) - 19 / 126) < 0.02  # two sets are independent


def test_a_greedy_choice_by_hand():
    """The vectorized choice equals going through the words in the same random order, one by one."""
    rng = generator(9)
    for trial in range(200):
        rows = np.sort(rng.integers(5, size=40))
        sizes, budget = rng.integers(1, 6, size=40), rng.integers(1, 12, size=5)
        chance = generator(trial).integers(2**32, size=40, dtype=np.uint32)
        taken = _words_within(sizes, rows, budget, chance)
        left, expected = budget.copy(), np.zeros(40, bool)
        for word in np.lexsort((chance, rows)):
            if sizes[word] <= left[rows[word]]:
                left[rows[word]] -= sizes[word]
                expected[word] = True
        assert (taken == expected).all()


def test_counts_say_what_the_blocks_hold():
    """Each figure of the manifest, counted again from rows and blocks."""
    store, counts = made_store(60, longest=30), Counter()
    blocks, rows = blocks_of(store, 5, counts=counts), rows_between(store, 0, 60, 128, False, (0, 5))
    assert counts["truncated_tokens"] == rows.truncated.sum() > 0
    assert counts["masked_tokens"] == sum(len(block.mask_ids) for block in blocks)
    assert counts["chunks_of_several"] == rows.several.sum() and counts["random"] == rows.is_random.sum()
    assert counts["random_of_several"] == rows.is_random[rows.several].sum()
