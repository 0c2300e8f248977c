"""Tokenized documents -> blocks of NSP rows with masks, as in BERT and TinyBERT: pure functions of (tokens, Generator).

Unlike TinyBERT's pregeneration the target length is drawn for every row and second segments come from the whole corpus.
Letters: R rows, T tokens, W words, P masked positions of all rows."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from shards.block import BLOCK_ROWS, Block
from shards.store import Store
from shards.tokenizer import Vocabulary

SHORT_ROWS = 0.1  # share of rows that aim at a length drawn from 2 to the full one (BERT: short_seq_prob)
RANDOM_NEXT = 0.5
MASK_PROB = 0.15


def cut_document(ends: list[int], capacity: int, second: str, rng: np.random.Generator) -> list[tuple]:
    """Cut a document into rows (first sentence, end of A, end of the chunk, target in tokens, is B random), in order.

    `ends` are the token offsets of its n sentences, n + 1 of them; `capacity` is a row's length without special tokens.  `second`
    is `any` (B follows A or is random), `next` (B follows A, or is empty after one sentence) or `none` (A is the chunk)."""
    n = len(ends) - 1
    rows, draws, i = [], [], 0
    while i < n:
        draws = draws or rng.random((min(n - i, 64), 4)).tolist()  # most sentences begin no row
        short, length, cut, coin = draws.pop()
        target = 2 + int(length * (capacity - 1)) if short < SHORT_ROWS else capacity
        j = min(bisect_left(ends, ends[i] + target, i + 1), n)  # the fewest sentences that reach the target
        a = j if second == "none" or j == i + 1 else i + 1 + int(cut * (j - i - 1))
        is_random = second == "any" and (j == i + 1 or coin < RANDOM_NEXT)
        rows.append((i, a, j, target, is_random))
        i = a if is_random else j  # a random B leaves the rest of the chunk to the next row
    return rows


def cut_documents(store: Store, first: int, last: int, capacity: int, one_segment: bool, rng: np.random.Generator) -> np.ndarray:
    """All rows of the documents first to last - 1, each as often as its copies: document, then what cut_document gives."""
    table = []
    for document in first + np.flatnonzero(np.diff(store.places[first:last + 1])):
        start, end = store.documents[document:document + 2].tolist()
        ends, places = store.sentences[start:end + 1].tolist(), store.places[document + 1] - store.places[document]
        second = "none" if one_segment else "any" if places < store.places[-1] else "next"  # no other document to draw from
        for _ in range(places // (end - start)):
            rows = cut_document(ends, capacity, second, rng)
            table += [(document, start + i, start + a, start + j, *more) for i, a, j, *more in rows]
    return np.array(table, np.int64)


def draw_rows(store: Store, table: np.ndarray, capacity: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(4 x R: start and end of A, start and end of B in the store's ids; R: tokens cut off) of the rows of a table."""
    document, i, a_last, j, target, is_random = table.T
    a_start, a_end, b_start, b_end = (store.sentences[index] for index in (i, a_last, a_last, j))
    a, where = a_end - a_start, np.flatnonzero(is_random)
    b_start[where], b_end[where] = _random_segments(store, document[where], (target - a)[where], rng)
    b = b_end - b_start
    excess = np.maximum(a + b - capacity, 0)
    uneven = np.minimum(excess, abs(a - b))  # BERT cuts single tokens, of the longer segment, front or back: here in one go
    a_cut = np.where(a > b, uneven, 0) + (excess - uneven) // 2
    b_cut = excess - a_cut
    a_front, b_front = rng.binomial(a_cut, 0.5), rng.binomial(b_cut, 0.5)
    return np.stack([a_start + a_front, a_end - a_cut + a_front, b_start + b_front, b_end - b_cut + b_front]), excess


def _random_segments(store: Store, own: np.ndarray, room: np.ndarray, rng: np.random.Generator) -> tuple:
    """Token slices of `room` tokens or their document's rest, from sentences drawn evenly from all copies of other documents."""
    own_places = store.places[own + 1] - store.places[own]
    drawn = (rng.random(len(own)) * (store.places[-1] - own_places)).astype(np.int64)
    drawn += np.where(drawn >= store.places[own], own_places, 0)
    document = np.searchsorted(store.places, drawn, "right") - 1
    start, end = store.documents[document], store.documents[document + 1]
    sentence = start + (drawn - store.places[document]) % (end - start)
    enough = np.searchsorted(store.sentences, store.sentences[sentence] + room)
    return store.sentences[sentence], store.sentences[np.clip(enough, sentence + 1, end)]


def _runs(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """start, start + 1, ... start + size - 1 of every run, one after the other."""
    return np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())


def words(ids: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary, whole_word: bool) -> tuple:
    """(places in the flat ids, tokens, rows), W each, of what is masked together: words or tokens, but no special ones."""
    special = vocabulary.special[ids]
    edges = special | vocabulary.begins_word[ids] if whole_word else np.ones(len(ids), bool)
    edges[1:] |= special[:-1]  # each row begins with one, so no word crosses two rows
    edges = np.append(np.flatnonzero(edges), len(ids))  # a word ends where the next one or a special token stands
    inside = ~special[edges[:-1]]
    starts = edges[:-1][inside]
    of_row = np.diff(np.searchsorted(starts, np.cumsum(lengths)), prepend=0)
    return starts, np.diff(edges)[inside], np.repeat(np.arange(len(lengths)), of_row)


def masked(found: tuple, ids: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary, draw: Callable, row_length: int):
    """One mask set of at most BLOCK_ROWS rows: (counts R, positions in their rows P, ids that stand there P).

    `found` is what words() gave; draw(purpose 0 to 2, places in the flat ids) gives a uint32 of chance for each place."""
    budget = np.clip(np.rint(lengths * MASK_PROB), 1, round(0.16 * row_length)).astype(np.int64)  # BERT's: 20 of 128 at most
    taken = np.flatnonzero(_words_within(*found[1:], budget, draw(0, found[0])))
    starts, sizes, rows = (column[taken] for column in found)
    where = _runs(starts, sizes)
    new, kind = ids[where], draw(1, where)
    new[kind < int(0.8 * 2**32)] = vocabulary.mask  # 80 %; 10 % stay what they are, 10 % become any id that may replace
    other = np.flatnonzero(kind >= int(0.9 * 2**32))
    allowed = np.flatnonzero(vocabulary.may_replace)
    new[other] = allowed[draw(2, where[other]).astype(np.uint64) * np.uint64(len(allowed)) >> np.uint64(32)]
    counts = np.bincount(rows, sizes, len(lengths)).astype(np.int64)
    return counts, where - np.repeat(np.cumsum(lengths) - lengths, counts), new


def _words_within(sizes: np.ndarray, rows: np.ndarray, budget: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """bool W: what is taken when each row goes through its words by `chance` and skips what exceeds its budget."""
    assert len(budget) <= 2**9 and len(sizes) <= 2**23, "the sorted integers hold no larger row or word numbers"
    taken, left, some = np.zeros(len(sizes), bool), budget.copy(), chance < 2**30
    for part in (some, ~some):  # a quarter of the words nearly always fills the budget: the others are seldom sorted
        number = np.flatnonzero(part & (left[rows] > 0)).astype(np.uint64)
        of_row, coin = rows[number].astype(np.uint64), chance[number].astype(np.uint64)
        # Sorting integers of row (9 bits), chance (32), word (23) is several times faster than argsort by (row, chance).
        order = (np.sort(of_row << np.uint64(55) | coin << np.uint64(23) | number) & np.uint64(2**23 - 1)).astype(np.int64)
        at, ends = (np.searchsorted(of_row, np.arange(len(budget)), side) for side in ("left", "right"))
        while len(row := np.flatnonzero((at < ends) & (left > 0))):  # the next word of each row
            word = order[at[row]]
            fits = sizes[word] <= left[row]
            taken[word[fits]] = True
            left[row[fits]] -= sizes[word[fits]]
            at += 1
    return taken


def make_blocks(store: Store, first: int, last: int, vocabulary: Vocabulary, settings, for_rows: np.random.Generator,
                for_masks: np.random.Generator, counts: Counter) -> Iterator[Block]:
    """The documents first to last - 1 as blocks with independent mask sets; `counts` gains what came out."""
    capacity = settings.row_length - (2 if settings.one_segment else 3)
    table = cut_documents(store, first, last, capacity, settings.one_segment, for_rows)
    position = np.min_scalar_type(settings.row_length - 1)
    for at in range(0, len(table), BLOCK_ROWS):
        rows = table[at:at + BLOCK_ROWS]
        spans, truncated = draw_rows(store, rows, capacity, for_rows)
        starts, sizes = spans[::2], spans[1::2] - spans[::2]
        first_segment = sizes[0] + 2  # [CLS] A [SEP] B [SEP], or [CLS] A [SEP] where B is empty
        lengths = first_segment + sizes[1] + (sizes[1] > 0)
        begin = np.cumsum(lengths) - lengths
        ids = np.full(lengths.sum(), vocabulary.sep, store.ids.dtype)
        ids[begin] = vocabulary.cls
        to, starts, sizes = (both.T.ravel() for both in (np.stack([begin + 1, begin + first_segment]), starts, sizes))
        ids[_runs(to, sizes)] = store.ids[_runs(starts, sizes)]
        found = words(ids, lengths, vocabulary, settings.masking == "whole-word")
        sets = [masked(found, ids, lengths, vocabulary, lambda _, its: for_masks.integers(2**32, size=len(its), dtype=np.uint32),
                       settings.row_length) for _ in range(settings.mask_sets)]
        per_row, positions, new = zip(*sets, strict=True)
        is_random, several = rows[:, 5], rows[:, 3] - rows[:, 1] > 1  # the chunk has two sentences or more
        yield Block(ids, lengths.astype(np.uint16), first_segment.astype(np.uint16), is_random.astype(np.uint8),
                    np.stack(per_row).astype(np.uint16), np.concatenate(positions).astype(position), np.concatenate(new))
        counts.update(rows=len(lengths), tokens=len(ids), truncated_tokens=truncated.sum(), masked_tokens=sum(map(len, new)),
                      chunks_of_several=several.sum(), random=is_random.sum(), random_of_several=is_random[several].sum())
        store.let_go()
