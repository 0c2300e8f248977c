"""HEART: which rows at which step.  The position of a run is one integer, the row j it begins with.

The order is a pure function of (manifest, seed, lanes).  With T training rows, row j of a run lies in pass e = j // T at
u = j % T; its lane is u % lanes, its offset in the lane u // lanes.  In pass e the shards, in an order drawn from (seed, e)
and laid end to end, are T places; lane l owns the consecutive places from l*(T//lanes) + min(l, T%lanes) on.  Place k of a
shard is entry k of its row permutation, drawn from (seed, e, shard).  So each pass is every row exactly once.  A global batch
is rows j to j+batch-1; its place c belongs to rank (c % lanes) % world.  Letters: R rows, L positions."""

import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from shards.block import BLOCK_ROWS, Block, Manifest, Shard, chance, read_checked

ORDER, ROWS = 1, 2  # tags that keep the draws of shard order and row order apart
GATHERED = 2048  # rows gathered at once: numpy's cost for each call vanishes, and they fit in a processor's cache
READERS = 4  # shards read at the same time
LENGTH, FIRST, NUMBER, EPOCH = range(4)  # columns of the facts of rows
GAMMA = np.uint64(0x9E3779B97F4A7C15)  # of SplitMix64


@dataclass(frozen=True)
class Batch:
    """Rows of one micro batch, padded to the longest, rounded up to a multiple of 8, or to the row length."""
    ids: np.ndarray  # (R, L) int64, masked if the stream masks
    segments: np.ndarray  # (R, L) int64: 0 in [CLS] A [SEP], 1 in B [SEP], 0 on padding
    real: np.ndarray  # (R, L) bool: True on tokens
    numbers: np.ndarray  # (R,) int64: the rows' numbers in the manifest's order of shards
    words: np.ndarray | None = None  # (3, P) int64: row, position and true id of all that is masked; where they are asked for


def splitmix64(state: np.ndarray) -> np.ndarray:
    """The next output of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014); uint64."""
    z = state + GAMMA
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class DynamicMasks:
    """New masks in each pass by the build's rules and vocabulary, a function of (seed, pass, row); ValueError without them."""

    def __init__(self, folder: str | Path, manifest: Manifest, seed: int):
        if not manifest.vocabulary:
            raise ValueError(f"mask=dynamic, but {folder} has no vocabulary.npy; build the shards again, or write mask=none")
        flags = np.load(io.BytesIO(read_checked(folder, "vocabulary.npy", manifest.vocabulary)), allow_pickle=False)
        self.special, self.begins_word, self.may_replace = ((flags & bit) > 0 for bit in (1, 2, 4))
        self.mask, self.row_length, self.seed = manifest.tokenizer["mask"], manifest.row_length, np.array([seed], np.uint64)
        self.whole_word = manifest.settings["masking"] == "whole-word"

    def apply(self, ids: np.ndarray, lengths: np.ndarray, epochs: np.ndarray, numbers: np.ndarray,
              labels: np.ndarray) -> None:
        """Mask padded rows (R, L); labels get what stood there.  Three chances a position follow from a row's pass and number."""
        from shards.pairs import masked, words  # here: only these masks need the build's libraries
        keys = splitmix64(splitmix64(splitmix64(self.seed) + epochs.astype(np.uint64)) + numbers.astype(np.uint64))
        for start in range(0, len(ids), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            row, position = np.nonzero(np.arange(ids.shape[1]) < lengths[part, None])
            flat, row = ids[part][row, position], row + start

            def draw(purpose: int, where: np.ndarray) -> np.ndarray:
                count = (3 * position[where] + purpose).astype(np.uint64)
                return (splitmix64(keys[row[where]] + count * GAMMA) >> np.uint64(32)).astype(np.uint32)
            found = words(flat, lengths[part], self, self.whole_word)
            counts, where, new = masked(found, flat, lengths[part], self, draw, self.row_length)
            at = start + np.repeat(np.arange(len(counts)), counts), where
            labels[at], ids[at] = ids[at], new


class Stream:
    """One rank's share of every global batch; shards are read ahead by threads.

    `read` opens and checks a shard; `mask`: precomputed, none or what to apply; `padded`: rows as long as any may be; `words`:
    with what is masked; `batch`: a multiple of `lanes`; ValueError where `lanes` is none of `world`.  In memory are GATHERED rows
    and two decoded shards a lane: its own and, a quarter of a shard before its end, the next (more where shards are tiny)."""

    def __init__(self, manifest: Manifest, read: Callable[[Shard], Block], *, seed: int, batch: int, lanes: int, rank: int = 0,
                 world: int = 1, mask: str | DynamicMasks = "precomputed", padded: bool = False, words: bool = False):
        if lanes % world:
            raise ValueError(f"lanes={lanes} do not divide over {world} ranks; start with a number of ranks that "
                             f"divides {lanes}, or write lanes=N with N a multiple of {world} that divides batch={batch}")
        self.manifest, self.read, self.mask, self.padded, self.words = manifest, read, mask, padded, words
        self.seed, self.batch, self.lanes, self.rank, self.world = seed, batch, lanes, rank, world
        self.mine = np.flatnonzero(np.arange(batch) % lanes % world == rank)
        self.sizes = np.array([shard.rows for shard in manifest.shards])
        self.order = lru_cache(lambda epoch: chance(seed, ORDER, epoch).permutation(len(self.sizes)))  # of the shards in a pass
        self.shards = manifest.shards + manifest.held_out
        self.first_row = np.cumsum([0, *(shard.rows for shard in self.shards)])
        quarter = lanes * manifest.rows // len(self.sizes) // 4 // batch  # batches in which a lane reads a quarter of a shard
        self.steps, self.ahead = max(1, min(quarter, GATHERED // len(self.mine))), quarter * batch
        self.decoded: dict[int, Future] = {}  # what _decode gives, by pass * shards + shard
        self.readers = ThreadPoolExecutor(READERS)
        self.span, self.rows = range(-1), None  # the batches at hand, by the row each begins with

    def plan(self, j: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """This rank's rows of some batches from row j on: (pass * shards + shard, entry of that shard's row order)."""
        rows = (j + np.arange(steps)[:, None] * self.batch + self.mine).ravel()
        total, lanes = self.manifest.rows, self.lanes
        epochs, (offsets, lane) = rows // total, np.divmod(rows % total, lanes)
        at = lane * (total // lanes) + np.minimum(lane, total % lanes) + offsets
        keys = epochs * len(self.sizes)
        for epoch in np.unique(epochs).tolist():
            order, here = self.order(epoch), epochs == epoch
            begins = np.cumsum(self.sizes[order]) - self.sizes[order]
            slots = np.searchsorted(begins, at[here], side="right") - 1
            keys[here] += order[slots]
            at[here] -= begins[slots]
        return keys, at

    def batches(self, j: int, micro: int) -> list[Batch]:
        """A rank's share of the global batch at row j, sorted by length, `micro` rows at once.  ValueError names a bad shard."""
        share = len(self.mine)
        if j not in self.span:
            if j != self.span.stop:
                self.decoded.clear()  # of another place, or not to be read: it is tried again
            steps, self.span = self.steps if self.decoded else 1, range(-1)
            keys, entries = self.plan(j, steps)
            self._open(keys)
            self.rows = self._joined(self.decoded, keys, entries, np.arange(len(keys)) // share)
            self.span = range(j, j + steps * self.batch, self.batch)
            following, later = (self.plan(self.span.stop + more, 1)[0] for more in (0, self.ahead))
            for key in {*keys.tolist()} - {*following.tolist(), *later.tolist()}:
                del self.decoded[key]
            self._open(later)  # ahead
        at = self.span.index(j) * share
        return [self._cut(*self.rows, slice(n, min(n + micro, at + share))) for n in range(at, at + share, micro)]

    def _cut(self, kinds: np.ndarray, facts: np.ndarray, some: slice) -> Batch:
        lengths, first, numbers = facts[some, :3].T
        positions = np.arange(-(-(self.manifest.row_length if self.padded else lengths.max()) // 8) * 8)
        real = positions < lengths[:, None]
        segments = (positions >= first[:, None]) & real
        ids, *labels = kinds[:, some, :len(positions)].astype(np.int64)
        words = [np.stack([*(at := np.nonzero(x != self.manifest.tokenizer["pad"])), x[at]]) for x in labels]
        return Batch(ids, segments.astype(np.int64), real, numbers, *words)

    def _open(self, keys: np.ndarray) -> None:
        for key in sorted({*keys.tolist()} - self.decoded.keys()):
            epoch, n = divmod(key, len(self.sizes))
            order = chance(self.seed, ROWS, epoch, n).permutation(self.sizes[n])
            self.decoded[key] = self.readers.submit(self._decode, n, order, epoch)

    def _decode(self, n: int, order: np.ndarray, epoch: int) -> tuple[np.ndarray, ...]:
        """Shard n in an order: (windows of its flat ids, each from one id on; the window of each row; facts (R, 4)).
        The ids are of one kind or two, the second being labels: true ids where there is a mask, padding elsewhere."""
        block, width = self.read(self.shards[n]), -(-self.manifest.row_length // 8) * 8
        flat = np.full((1 + self.words, len(block.ids) + width), self.manifest.tokenizer["pad"], block.ids.dtype)
        flat[0, :len(block.ids)] = block.ids
        begins = np.cumsum(block.lengths, dtype=np.int64) - block.lengths
        if self.mask == "precomputed":
            mask_set, counts = epoch % self.manifest.mask_sets, block.mask_counts.sum(1, dtype=np.int64)
            some = slice(counts[:mask_set].sum(), counts[:mask_set + 1].sum())
            at = np.repeat(begins, block.mask_counts[mask_set]) + block.mask_positions[some]
            flat[-1, at], flat[0, at] = flat[0, at], block.mask_ids[some]
        facts = np.stack([block.lengths[order], block.first[order], self.first_row[n] + order, np.full(len(order), epoch)], 1)
        return np.lib.stride_tricks.sliding_window_view(flat, width, 1), begins[order], facts

    def _joined(self, decoded: dict[int, Future], keys: np.ndarray, entries: np.ndarray, steps: np.ndarray) -> tuple:
        """Entries of decoded shards, by step and length, padded and masked: ids (1 or 2, R, row length) and facts (R, 4)."""
        by_key, parts = np.argsort(keys, kind="stable"), []
        for group in np.split(by_key, np.flatnonzero(np.diff(keys[by_key])) + 1):
            windows, begins, facts = decoded[int(keys[group[0]])].result()
            parts.append((windows[:, begins[entries[group]]], facts[entries[group]]))
        kinds, facts = (np.concatenate(both, -2) for both in zip(*parts, strict=True))
        order = np.lexsort((facts[:, NUMBER], facts[:, LENGTH], steps[by_key]))
        kinds, facts = kinds[:, order], facts[order]
        behind = np.arange(kinds.shape[-1]) >= facts[:, LENGTH, None]
        kinds[np.broadcast_to(behind, kinds.shape)] = self.manifest.tokenizer["pad"]  # a mask of all axes is 12 times faster
        if isinstance(self.mask, DynamicMasks):
            self.mask.apply(kinds[0], facts[:, LENGTH], facts[:, EPOCH], facts[:, NUMBER], kinds[-1])
        return kinds, facts

    def held_out(self, most: int, micro: int) -> list[Batch]:
        """This rank's share of the first `most` held-out rows; numbered on behind the training rows."""
        first = self.manifest.rows
        return self._picked(np.arange(first + self.rank, min(first + most, self.first_row[-1]), self.world), micro)

    def some(self, most: int) -> Batch:
        """Up to `most` rows of the first training shard, from end to end of it; the same ones on all ranks."""
        return self._picked(np.linspace(0, self.sizes[0] - 1, min(most, self.sizes[0])).astype(int), most)[0]

    def _picked(self, rows: np.ndarray, micro: int) -> list[Batch]:
        """Rows by their numbers, masked as in pass 0."""
        shards = np.searchsorted(self.first_row, rows, side="right") - 1
        decoded = {n: self.readers.submit(self._decode, n, np.arange(self.shards[n].rows), 0) for n in np.unique(shards).tolist()}
        joined = self._joined(decoded, shards, rows - self.first_row[shards], np.zeros_like(rows)) if decoded else ()
        return [self._cut(*joined, slice(n, n + micro)) for n in range(0, len(rows), micro)]


def micro_rows(share: int, most: int) -> int:
    """Rows of a micro batch, at most `most`, for a rank's share of the global batch.  ValueError where they do not divide it."""
    if share > most and share % most:
        raise ValueError(f"a rank's share of the batch is {share} rows, no multiple of the engine file's train_micro_batch_size_"
                         f"per_gpu={most}; write a batch= that is a multiple of ranks x micro batch")
    return min(share, most)
