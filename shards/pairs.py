"""Tokenized documents -> blocks of NSP rows with masks, as in BERT and TinyBERT: pure functions of (tokens, Generator).

A segment is consecutive sentences of one document, so in the store's flat ids it is a slice, also after truncation: a
row is four integers until its block is gathered.  Unlike TinyBERT's pregeneration the target length is drawn for every
row (not once a document), second segments come from the whole corpus, everything is seeded, and masks are drawn for a
whole block at a time.  Letters: R rows, T tokens of all rows, W words of all rows, P masked positions of all rows.
"""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shards.block import BLOCK_ROWS, Block, position_type
from shards.store import Store
from shards.tokenizer import Vocabulary

SHORT_ROWS = 0.1  # share of rows that aim at a length drawn from 2 to the full one (BERT: short_seq_prob)
RANDOM_NEXT = 0.5
MASK_PROB = 0.15


@dataclass(frozen=True)
class Rows:
    """Rows as slices of the store's ids; B is empty in a row of one segment."""

    a_start: np.ndarray  # R
    a_end: np.ndarray
    b_start: np.ndarray
    b_end: np.ndarray
    is_random: np.ndarray  # R bool
    truncated: np.ndarray  # R: tokens cut off


def cut_document(ends: list[int], capacity: int, second: str, rng: np.random.Generator) -> list[tuple]:
    """Cut a document into rows (first sentence, end of A, end of the chunk, target in tokens, is B random), in order.

    `ends` are the token offsets of its n sentences, n + 1 of them; `capacity` is a row's length without special tokens.
    `second` is `any` (B follows A or is random), `next` (B follows A, or is empty where the chunk has one sentence) or
    `none` (A is the chunk).  A row with a random B uses only A of its chunk: the next row starts with what is put back.
    """
    n = len(ends) - 1
    draws = rng.random((n, 4)).tolist()
    rows, i = [], 0
    while i < n:
        short, length, cut, coin = draws[len(rows)]
        target = 2 + int(length * (capacity - 1)) if short < SHORT_ROWS else capacity
        j = min(bisect_left(ends, ends[i] + target, i + 1), n)  # the fewest sentences that reach the target
        a = j if second == "none" or j == i + 1 else i + 1 + int(cut * (j - i - 1))
        is_random = second == "any" and (j == i + 1 or coin < RANDOM_NEXT)
        rows.append((i, a, j, target, is_random))
        i = a if is_random else j
    return rows


def draw_rows(store: Store, pool: np.ndarray, first: int, last: int, row_length: int, one_segment: bool,
              rng: np.random.Generator) -> Rows:
    """The rows of the documents pool[first:last].  Random second segments come from all of `pool` (document numbers).

    Where the pool holds a single document, pairs are true ones and a chunk of one sentence is a row of one segment.
    """
    second = "none" if one_segment else "any" if len(pool) > 1 else "next"
    capacity = row_length - (2 if one_segment else 3)
    parts, places = [], []
    for place in range(first, last):
        start, end = store.documents[pool[place]:pool[place] + 2].tolist()
        rows = cut_document(store.sentences[start:end + 1].tolist(), capacity, second, rng)
        parts.append(np.array(rows, np.int64) + [start, start, start, 0, 0])
        places.append(np.full(len(rows), place))
    i, b_first, b_last, target, is_random = np.concatenate(parts).T
    a_tokens = store.sentences[b_first] - store.sentences[i]
    spans = [store.sentences[index] for index in (i, b_first, b_first, b_last)]
    where = np.flatnonzero(is_random)
    if len(where):
        drawn = _random_segments(store, pool, np.concatenate(places)[where], (target - a_tokens)[where], rng)
        spans[2][where], spans[3][where] = drawn
    return _truncated(*spans, is_random.astype(bool), capacity, rng)


def _random_segments(store: Store, pool: np.ndarray, own: np.ndarray, room: np.ndarray,
                     rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Token slices that start at a sentence drawn evenly from all other documents of the pool (`own`: places in it).

    They end with their document or at the first sentence end that fills `room` tokens, one sentence at least.
    """
    starts, ends = store.documents[pool], store.documents[pool + 1]
    before = np.concatenate([[0], np.cumsum(ends - starts)])  # sentences of the pool before each place
    own_sentences = before[own + 1] - before[own]
    drawn = (rng.random(len(own)) * (before[-1] - own_sentences)).astype(np.int64)
    drawn += np.where(drawn >= before[own], own_sentences, 0)
    place = np.searchsorted(before, drawn, "right") - 1
    sentence = starts[place] + drawn - before[place]
    enough = np.searchsorted(store.sentences, store.sentences[sentence] + room)
    last = np.clip(enough, sentence + 1, ends[place])
    return store.sentences[sentence], store.sentences[last]


def _truncated(a_start, a_end, b_start, b_end, is_random, capacity: int, rng: np.random.Generator) -> Rows:
    """BERT drops one token at a time from the longer segment (B where equal), front or back by a coin: in one go."""
    a, b = a_end - a_start, b_end - b_start
    excess = np.maximum(a + b - capacity, 0)
    uneven = np.minimum(excess, abs(a - b))
    a_cut = np.where(a > b, uneven, 0) + (excess - uneven) // 2
    b_cut = excess - a_cut
    a_front, b_front = rng.binomial(a_cut, 0.5), rng.binomial(b_cut, 0.5)
    return Rows(a_start + a_front, a_end - a_cut + a_front, b_start + b_front, b_end - b_cut + b_front,
                is_random, excess)


def _gathered(store: Store, rows: Rows, vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids T, lengths R, first R) of `[CLS] A [SEP] B [SEP]`, or `[CLS] A [SEP]` where B is empty."""
    a, b = rows.a_end - rows.a_start, rows.b_end - rows.b_start
    first = a + 2
    lengths = first + b + (b > 0)
    begin = np.cumsum(lengths) - lengths
    ids = np.full(lengths.sum(), vocabulary.sep, store.ids.dtype)
    ids[begin] = vocabulary.cls
    sizes = np.stack([a, b], 1).ravel()
    steps = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    source = np.repeat(np.stack([rows.a_start, rows.b_start], 1).ravel(), sizes)
    target = np.repeat(np.stack([begin + 1, begin + first], 1).ravel(), sizes)
    ids[target + steps] = store.ids[source + steps]
    return ids, lengths, first


def masked(ids: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary, rng: np.random.Generator, *,
           whole_word: bool = True, mask_prob: float = MASK_PROB, max_predictions: int | None = None):
    """One mask set of a block: (counts R, positions in their rows P, ids that stand there P).

    A row's budget is min(max_predictions, max(1, round(length * mask_prob))) tokens.  Its words come in random order;
    one that would exceed the budget is skipped.  80 % become [MASK], 10 % stay, 10 % become any id that may replace.
    """
    rows = np.repeat(np.arange(len(lengths)), lengths)
    candidate = ~vocabulary.special[ids]
    begins = candidate.copy()
    if whole_word:
        begins[1:] &= vocabulary.begins_word[ids[1:]] | ~candidate[:-1]
    word = np.cumsum(begins) - 1  # of each candidate token
    budget = np.maximum(1, np.rint(lengths * mask_prob)).astype(np.int64)
    if max_predictions is not None:
        budget = np.minimum(budget, max_predictions)
    taken = _words_within(np.bincount(word[candidate], minlength=begins.sum()), rows[begins], budget, rng)
    where = np.flatnonzero(candidate)
    where = where[taken[word[where]]]
    new = ids[where]
    kind = rng.random(len(where))
    new[kind < 0.8] = vocabulary.mask
    other = np.flatnonzero(kind >= 0.9)
    allowed = np.flatnonzero(vocabulary.may_replace)
    new[other] = allowed[rng.integers(len(allowed), size=len(other))]
    begin = np.cumsum(lengths) - lengths
    return np.bincount(rows[where], minlength=len(lengths)), where - begin[rows[where]], new


def _words_within(sizes: np.ndarray, rows: np.ndarray, budget: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """bool W: what is taken when each row goes through its words in random order and skips what exceeds its budget."""
    taken = np.zeros(len(sizes), bool)
    left = budget.copy()
    # Sorting integers of row (9 bits), random (32), word (23) is several times faster than argsort by (row, random).
    chance = rng.integers(2**32, size=len(sizes), dtype=np.uint64)
    key = (rows.astype(np.uint64) << np.uint64(55)) | (chance << np.uint64(23)) | np.arange(len(sizes), dtype=np.uint64)
    order = (np.sort(key) & np.uint64(2**23 - 1)).astype(np.int64)
    while len(order := order[sizes[order] <= left[rows[order]]]):  # what exceeds now exceeds for good
        row, size = rows[order], sizes[order]
        total = np.cumsum(size)
        begin = np.searchsorted(row, row)  # where the row's words begin in the order
        fits = total - total[begin] + size[begin] <= left[row]
        broken = np.cumsum(~fits)
        fits &= broken == broken[begin]  # only up to the first word that exceeds; a row's first word always fits
        taken[order[fits]] = True
        left -= np.bincount(row[fits], size[fits], len(left)).astype(np.int64)
        order = order[~fits]
    return taken


def make_blocks(store: Store, rows: Rows, vocabulary: Vocabulary, rng: np.random.Generator, *, row_length: int,
                mask_sets: int, whole_word: bool) -> Iterator[Block]:
    """Rows as blocks of at most BLOCK_ROWS rows, each with `mask_sets` independent mask sets."""
    max_predictions = round(0.16 * row_length)  # 20 at 128, as in BERT
    columns = vars(rows)
    for start in range(0, len(rows.a_start), BLOCK_ROWS):
        part = Rows(**{name: column[start:start + BLOCK_ROWS] for name, column in columns.items()})
        ids, lengths, first = _gathered(store, part, vocabulary)
        sets = [masked(ids, lengths, vocabulary, rng, whole_word=whole_word, max_predictions=max_predictions)
                for _ in range(mask_sets)]
        yield Block(
            ids=ids, lengths=lengths.astype(np.uint16), first=first.astype(np.uint16),
            is_random=part.is_random.astype(np.uint8),
            mask_counts=np.stack([counts for counts, _, _ in sets]).astype(np.uint16),
            mask_positions=np.concatenate([positions for _, positions, _ in sets]).astype(position_type(row_length)),
            mask_ids=np.concatenate([new for _, _, new in sets]),
        )
