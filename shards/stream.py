"""HEART: which rows at which step.  The position of a run is one integer, the row j it begins with.

The order is a pure function of (manifest, seed, lanes).  With T training rows, row j of a run lies in pass
e = j // T at u = j % T; its lane is u % lanes, its offset in the lane u // lanes.  In pass e the shards, in an
order drawn from (seed, e) and laid end to end, are T places; lane l owns the consecutive places from
l*(T//lanes) + min(l, T%lanes) on.  Place k of a shard is entry k of its row permutation, drawn from
(seed, e, shard).  So each pass is every row exactly once, whatever the number and sizes of shards and lanes.
A global batch is rows j to j+batch-1; its place c belongs to rank (c % lanes) % world.

Letters: R rows of a batch, L positions.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shards.block import Block, Manifest, Shard

ORDER, ROWS = 1, 2  # tags that keep the draws of shard order and row order apart


@dataclass(frozen=True)
class Batch:
    """Rows of one micro batch, padded to the longest, rounded up to a multiple of 8."""

    ids: np.ndarray  # (R, L) int64, masked if the stream masks
    segments: np.ndarray  # (R, L) int64: 0 in [CLS] A [SEP], 1 in B [SEP], 0 on padding
    real: np.ndarray  # (R, L) bool: True on tokens
    numbers: np.ndarray  # (R,) int64: the rows' numbers in the manifest's order of shards

    @property
    def tokens(self) -> int:
        """Real tokens, padding not counted."""
        return int(self.real.sum())


@lru_cache(maxsize=4)
def shard_order(sizes: tuple[int, ...], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The shards of a pass in order, and the place at which each begins (one more entry: the end)."""
    order = np.random.Generator(np.random.PCG64([seed, ORDER, epoch])).permutation(len(sizes))
    return order, np.concatenate([[0], np.cumsum(np.array(sizes, np.int64)[order])])


def row_order(seed: int, epoch: int, shard: int, rows: int) -> np.ndarray:
    """The order in which a pass reads the rows of one shard."""
    return np.random.Generator(np.random.PCG64([seed, ROWS, epoch, shard])).permutation(rows)


def places(start: int, count: int, total: int, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows start .. start+count-1 of a run -> (their passes, their places in the pass)."""
    rows = np.arange(start, start + count, dtype=np.int64)
    epoch, u = rows // total, rows % total
    lane, offset = u % lanes, u // lanes
    return epoch, lane * (total // lanes) + np.minimum(lane, total % lanes) + offset


class Stream:
    """One rank's share of every global batch.

    `read` opens and checks one shard (shards.block.read_shard with the folder bound).  Decoded shards are kept
    while the rank's lanes stand in them, so memory is at most one shard a lane (two where a lane changes shard).
    ValueError where batch, lanes and world do not divide.
    """

    def __init__(self, manifest: Manifest, read: Callable[[Shard], Block], *, seed: int, batch: int, lanes: int,
                 rank: int = 0, world: int = 1, mask: str = "precomputed"):
        if batch % lanes:
            raise ValueError(f"batch={batch} does not divide over lanes={lanes}; write lanes=N with N a divisor of batch")
        if lanes % world:
            raise ValueError(f"lanes={lanes} do not divide over {world} ranks; start with a number of ranks that "
                             f"divides {lanes}, or write lanes=N with N a multiple of {world} that divides batch={batch}")
        if mask == "precomputed" and not manifest.mask_sets:
            raise ValueError("mask=precomputed, but the shards hold no mask sets; build them with --mask-sets 3, or mask=none")
        self.manifest, self.read = manifest, read
        self.seed, self.batch, self.lanes, self.mask = seed, batch, lanes, mask
        cells = np.arange(batch)
        self.mine = cells[(cells % lanes) % world == rank]
        self.sizes = tuple(shard.rows for shard in manifest.shards)
        self.first_row = np.concatenate([[0], np.cumsum(self.sizes)])
        self.decoded: dict[tuple[int, int], Decoded] = {}  # (pass, shard) ->

    def rows_at(self, j: int) -> list[tuple[int, int, int]]:
        """This rank's rows of the global batch that begins with row j: (pass, shard, row in the shard)."""
        return [(e, s, int(self._shard(e, s).order[k])) for e, s, k in self._cells(j)]

    def _cells(self, j: int) -> Iterator[tuple[int, int, int]]:
        epochs, at = places(j, self.batch, self.manifest.rows, self.lanes)
        for epoch, place in zip(epochs[self.mine].tolist(), at[self.mine].tolist(), strict=True):
            order, begins = shard_order(self.sizes, self.seed, epoch)
            slot = int(np.searchsorted(begins, place, side="right")) - 1
            yield epoch, int(order[slot]), place - int(begins[slot])

    def _shard(self, epoch: int, shard: int) -> "Decoded":
        found = self.decoded.get((epoch, shard))
        if found is None:
            same = next((d for (_, s), d in self.decoded.items() if s == shard), None)
            block = same.block if same else self.read(self.manifest.shards[shard])
            found = Decoded(block, row_order(self.seed, epoch, shard, self.sizes[shard]))
            self.decoded[epoch, shard] = found
        return found

    def batches(self, j: int, most: int) -> list[Batch]:
        """This rank's share of the global batch at row j, sorted by length, in micro batches of at most `most` rows.

        ValueError where the share is larger than `most` and no multiple of it.
        """
        micro = micro_rows(len(self.mine), most)
        rows = self.rows_at(j)
        used = {(e, s) for e, s, _ in rows}
        self.decoded = {key: value for key, value in self.decoded.items() if key in used}
        lengths = np.array([self.decoded[e, s].block.lengths[r] for e, s, r in rows])
        sets = self.manifest.mask_sets
        ordered = [rows[i] for i in np.argsort(lengths, kind="stable")]
        out = []
        for at in range(0, len(ordered), micro):
            cut = [(self.decoded[e, s], r, e % sets if self.mask == "precomputed" else None, int(self.first_row[s]) + r)
                   for e, s, r in ordered[at:at + micro]]
            out.append(pad(cut, self.manifest.tokenizer["pad"]))
        return out


def micro_rows(share: int, most: int) -> int:
    """Rows of a micro batch for a rank's share of the global batch."""
    if share > most and share % most:
        raise ValueError(f"a rank's share of the batch is {share} rows, no multiple of the engine file's "
                         f"train_micro_batch_size_per_gpu={most}; change one of them, such as batch to a multiple of "
                         "ranks x micro batch")
    return min(share, most)


class Decoded:
    """A shard in memory: where each row's tokens and masks begin."""

    def __init__(self, block: Block, order: np.ndarray | None = None):
        self.block, self.order = block, order
        self.begins = np.concatenate([[0], np.cumsum(block.lengths, dtype=np.int64)])
        self.mask_begins = np.concatenate([[0], np.cumsum(block.mask_counts.ravel(), dtype=np.int64)])

    def masked(self, number: int, mask_set: int) -> tuple[np.ndarray, np.ndarray]:
        """A row's masked positions in one set, and the ids that stand there."""
        at = mask_set * self.block.rows + number
        span = slice(self.mask_begins[at], self.mask_begins[at + 1])
        return self.block.mask_positions[span], self.block.mask_ids[span]

    def row(self, number: int, mask_set: int | None) -> tuple[np.ndarray, int]:
        """One row's ids (masked with that set, or as they are) and the length of its segment 0."""
        ids = self.block.ids[self.begins[number]:self.begins[number + 1]].astype(np.int64)
        if mask_set is not None:
            positions, shown = self.masked(number, mask_set)
            ids[positions] = shown
        return ids, int(self.block.first[number])


def pad(rows: list[tuple[Decoded, int, int | None, int]], pad_id: int) -> Batch:
    """(shard, row in it, mask set or None, row's number in the manifest) -> one padded batch."""
    parts = [shard.row(row, mask_set) for shard, row, mask_set, _ in rows]
    length = -(-max(len(ids) for ids, _ in parts) // 8) * 8
    ids = np.full((len(rows), length), pad_id, np.int64)
    segments, real = np.zeros_like(ids), np.zeros(ids.shape, bool)
    for i, (row, first) in enumerate(parts):
        ids[i, :len(row)] = row
        segments[i, first:len(row)] = 1
        real[i, :len(row)] = True
    return Batch(ids, segments, real, np.array([number for *_, number in rows], np.int64))


def held_out_batches(manifest: Manifest, read: Callable[[Shard], Block], *, most: int, rank: int, world: int,
                     micro: int, mask: str) -> list[Batch]:
    """This rank's share of the first `most` held-out rows, in micro batches; mask set 0 where the stream masks."""
    rows = []
    for shard in manifest.held_out:
        if len(rows) >= most:
            break
        decoded = Decoded(read(shard))
        rows += [(decoded, r, 0 if mask == "precomputed" else None, r) for r in range(shard.rows)][:most - len(rows)]
    mine = sorted(rows[rank::world], key=lambda row: int(row[0].block.lengths[row[1]]))
    return [pad(mine[at:at + micro], manifest.tokenizer["pad"]) for at in range(0, len(mine), micro)]
