"""The stream: a pure function of (manifest, seed, lanes), the same for any number of ranks and any restart."""

from concurrent.futures import wait
from threading import Event

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.block import Block, Manifest, Shard
from shards.stream import ROWS, DynamicMasks, Stream, chance, micro_rows

PAD = 9


def block(shard: int, rows: int) -> Block:
    """Row r of shard s holds the ids 1000 s + r, repeated; lengths differ; two mask sets, each masking its own place."""
    lengths = np.array([3 + (7 * r + shard) % 11 for r in range(rows)], np.uint16)
    ids = np.concatenate([np.full(n, 1000 * shard + r, np.uint16) for r, n in enumerate(lengths)])
    counts = np.ones((2, rows), np.uint16)
    return Block(ids, lengths, (lengths - 1).astype(np.uint16), np.zeros(rows, np.uint8), counts,
                 np.repeat(np.array([0, 1], np.uint8), rows), np.full(2 * rows, 60_000, np.uint16))


def manifest(sizes: list[int]) -> Manifest:
    shards = tuple(Shard(f"train-{n:05d}.tar", size, 0, 0, str(n)) for n, size in enumerate(sizes))
    return Manifest(format=1, tokenizer={"pad": PAD}, settings={}, row_length=16, mask_sets=2, rows=sum(sizes), tokens=0,
                    shards=shards, held_out=shards[:1], counts={})


class Opened:
    """Reads shards and remembers which."""

    def __init__(self):
        self.names = []

    def __call__(self, shard: Shard) -> Block:
        self.names.append(shard.name)
        return block(int(shard.sha256), shard.rows)


def stream(sizes, *, batch, lanes, rank=0, world=1, seed=0, mask="none", opened=None) -> Stream:
    return Stream(manifest(sizes), opened or Opened(), seed=seed, batch=batch, lanes=lanes, rank=rank, world=world, mask=mask)


def rows_at(one: Stream, j: int) -> list[tuple[int, int, int]]:
    """A rank's rows of the global batch that begins with row j: (pass, shard, row in the shard)."""
    keys, entries = one.plan(j, 1)
    found = [(*divmod(key, len(one.sizes)), entry) for key, entry in zip(keys.tolist(), entries.tolist(), strict=True)]
    return [(e, s, int(chance(one.seed, ROWS, e, s).permutation(one.sizes[s])[entry])) for e, s, entry in found]


def rows_of(sizes, start: int, steps: int, *, batch: int, lanes: int, worlds: list[int]) -> list[tuple[int, int, int]]:
    """(pass, shard, row) of a run that changes its number of ranks from step to step, in the batch's own order."""
    out = []
    for step in range(steps):
        world = worlds[step % len(worlds)]
        cells = {}
        for rank in range(world):
            one = stream(sizes, batch=batch, lanes=lanes, rank=rank, world=world)  # fresh: every step is a restart
            cells |= dict(zip(one.mine.tolist(), rows_at(one, start + step * batch), strict=True))
        out += [cells[c] for c in range(batch)]
    return out


@st.composite
def layouts(draw):
    lanes = draw(st.integers(1, 12))
    return dict(sizes=draw(st.lists(st.integers(1, 20), min_size=1, max_size=6)), lanes=lanes,
                batch=lanes * draw(st.integers(1, 3)))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@settings(max_examples=60, deadline=None)
@given(layouts(), st.data())
def test_any_ranks_and_any_restart_give_the_same_batches(layout, data):
    worlds = data.draw(st.lists(st.sampled_from(divisors(layout["lanes"])), min_size=1, max_size=3))
    start = layout["batch"] * data.draw(st.integers(0, 5))
    straight = stream(**layout)
    want = [row for step in range(4) for row in rows_at(straight, start + step * layout["batch"])]
    assert rows_of(layout["sizes"], start, 4, batch=layout["batch"], lanes=layout["lanes"], worlds=worlds) == want


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_each_pass_is_every_row_exactly_once(layout):
    total, batch = sum(layout["sizes"]), layout["batch"]
    one = stream(**layout)
    seen = [row for j in range(0, 3 * total + batch, batch) for row in rows_at(one, j)]
    everything = sorted((s, r) for s, n in enumerate(layout["sizes"]) for r in range(n))
    for epoch in range(3):
        part = seen[epoch * total:(epoch + 1) * total]
        assert {e for e, *_ in part} == {epoch}
        assert sorted((s, r) for _, s, r in part) == everything


def test_passes_and_seeds_differ():
    one, other = stream([40, 30], batch=10, lanes=5), stream([40, 30], batch=10, lanes=5, seed=1)
    first, second = ([r[1:] for j in range(at, at + 70, 10) for r in rows_at(one, j)] for at in (0, 70))
    assert first != second and first != [r[1:] for j in range(0, 70, 10) for r in rows_at(other, j)]


def row(shard: int, number: int, mask_set: int | None) -> np.ndarray:
    """What block() holds, one row at a time."""
    ids = np.full(3 + (7 * number + shard) % 11, 1000 * shard + number)
    if mask_set is not None:
        ids[mask_set] = 60_000
    return ids


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from(["none", "precomputed"]), st.data())
def test_batches_hold_the_rows_of_the_plan(layout, mask, data):
    """Straight on and after jumps, by any number of ranks: row for row what reading one row at a time gives."""
    world = data.draw(st.sampled_from(divisors(layout["lanes"])))
    steps = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=3))
    for rank in range(world):
        one = stream(**layout, rank=rank, world=world, mask=mask)
        for j in (layout["batch"] * (step + more) for step in steps for more in range(4)):
            want = [(int(one.first_row[s]) + r, row(s, r, e % 2 if mask == "precomputed" else None).tolist())
                    for e, s, r in rows_at(one, j)]
            batch, = one.batches(j, len(one.mine))
            got = [(n, ids[real].tolist()) for n, ids, real in zip(batch.numbers, batch.ids, batch.real, strict=True)]
            assert sorted(got) == sorted(want)


def quiet(one: Stream) -> None:
    """Wait until nothing is being read ahead."""
    wait(one.decoded.values())


@settings(max_examples=40, deadline=None)
@given(layouts(), st.data())
def test_a_rank_opens_only_its_lanes_shards(layout, data):
    """Those of the batches it gave out, of those gathered ahead, and of a quarter of a shard more."""
    world, opened = data.draw(st.sampled_from(divisors(layout["lanes"]))), Opened()
    one = stream(**layout, world=world, opened=opened)
    for j in range(0, data.draw(st.integers(1, 30)) * one.batch, one.batch):
        one.batches(j, len(one.mine))
    quiet(one)
    mine = {s for j in range(0, one.span.stop + one.ahead + 1, one.batch) for _, s, _ in rows_at(one, j)}
    assert set(opened.names) <= {one.manifest.shards[s].name for s in mine}


def test_memory_is_two_shards_a_lane():
    one = stream([5] * 40, batch=4, lanes=4)
    for j in range(0, 400, 4):
        one.batches(j, 4)
        quiet(one)
        assert len(one.decoded) <= 8


def test_a_lane_reads_each_shard_once_a_pass():
    for rank in range(4):
        opened = Opened()
        one = stream([16] * 8, batch=8, lanes=8, rank=rank, world=4, opened=opened)  # a lane is exactly one shard
        for j in range(0, 64, 8):
            one.batches(j, 2)
        assert len(opened.names) == len(set(opened.names)) == 2


class Held(Opened):
    """Reads some shards; the others only when `go` is set."""

    def __init__(self, some: set[str]):
        super().__init__()
        self.some, self.go = some, Event()

    def __call__(self, shard: Shard) -> Block:
        if shard.name not in self.some:
            assert self.go.wait(60)
        return super().__call__(shard)


@pytest.mark.parametrize("start, most", [(184, 4), (16 * 20 - 4, 8)])  # the next batch needs other shards
def test_seeking_waits_for_one_shard_a_lane(start, most):
    """Two where the batch spans two passes; no other shard is needed for the first batch."""
    plan = rows_at(stream([16] * 20, batch=8, lanes=4), start)
    assert len({(e, s) for e, s, _ in plan}) <= most
    held = Held({f"train-{s:05d}.tar" for _, s, _ in plan})
    batch, = stream([16] * 20, batch=8, lanes=4, opened=held).batches(start, 8)
    assert sorted(np.unique(batch.ids[batch.real]).tolist()) == sorted(1000 * s + r for _, s, r in plan)
    held.go.set()


def test_a_slow_shard_is_asked_for_a_quarter_of_a_shard_before_its_rows():
    """Every batch before the slow one comes, while the slow shard is being read already."""
    one = stream([400] * 3, batch=4, lanes=1)
    slow = [s for _, s, _ in rows_at(one, 400)][0]
    held = Held({f"train-{s:05d}.tar" for s in range(3) if s != slow})
    one = stream([400] * 3, batch=4, lanes=1, opened=held)
    asked = []
    for j in range(0, 400 - one.steps * 4, 4):  # the rest is gathered together with the slow shard's first rows
        one.batches(j, 4)
        asked += [j] if slow in one.decoded else []
    assert asked and asked[0] <= 400 - 100 and not one.decoded[slow].done()
    held.go.set()
    assert [s for _, s, _ in rows_at(one, 400)] == (one.batches(400, 4)[0].numbers // 400).tolist()


def test_a_shard_that_cannot_be_read_is_said_when_its_rows_come():
    """And not before; asked again, the stream tries again."""
    class Broken(Opened):
        bad = None

        def __call__(self, shard):
            if shard.name == self.bad:
                raise ValueError(f"shard {shard.name}: damaged")
            return super().__call__(shard)

    opened = Broken()
    one = stream([400] * 3, batch=4, lanes=1, opened=opened)
    opened.bad = f"train-{rows_at(one, 400)[0][1]:05d}.tar"
    for j in range(0, 400 - one.steps * 4, 4):
        one.batches(j, 4)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"shard {opened.bad}: damaged"):
            one.batches(400, 4)
    opened.bad = None
    assert len(one.batches(400, 4)[0].ids) == 4


def test_batches_are_padded_sorted_and_masked_by_the_pass():
    one = stream([12, 8], batch=10, lanes=5, mask="precomputed")
    for j in (0, 10, 20, 30):  # passes 0, 0, 1, 1
        micro = one.batches(j, 5)
        assert [len(b.ids) for b in micro] == [5, 5]
        lengths = [int(n) for b in micro for n in b.real.sum(1)]
        assert lengths == sorted(lengths)
        for b in micro:
            assert b.ids.shape[1] % 8 == 0 and b.ids.shape == b.segments.shape == b.real.shape
            assert (b.ids[~b.real] == PAD).all() and (b.segments[~b.real] == 0).all()
            assert (b.segments.sum(1) == 1).all()  # one token stands in segment 1
            masked = np.argwhere(b.ids == 60_000)
            assert masked.tolist() == [[row, j // 20] for row in range(5)]


def test_the_unmasked_rows_are_those_of_the_shards():
    one = stream([12, 8], batch=10, lanes=5)
    for batch in one.batches(0, 5):
        for ids, real in zip(batch.ids, batch.real, strict=True):
            row = ids[real]
            shard, number = divmod(int(row[0]), 1000)
            assert (row == row[0]).all() and len(row) == 3 + (7 * number + shard) % 11


def test_row_numbers_count_through_the_shards():
    one = stream([12, 8], batch=10, lanes=5)
    numbers = np.concatenate([b.numbers for j in (0, 10) for b in one.batches(j, 10)])
    assert sorted(numbers.tolist()) == list(range(20))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_held_out_rows_are_counted_once_over_the_ranks(world):
    made = manifest([10])
    parts = [Stream(made, Opened(), seed=0, batch=6, lanes=6, rank=r, world=world, mask="none").held_out(7, 2)
             for r in range(world)]
    rows = sorted(int(n) for part in parts for b in part for n in b.numbers)
    assert rows == list(range(10, 17))  # behind the training rows


@pytest.mark.parametrize("make, says", [
    (lambda: stream([9], batch=8, lanes=4, world=3), "lanes=4 do not divide over 3 ranks; start with a number of ranks"),
    (lambda: micro_rows(48, 32), "share of the batch is 48 rows, no multiple of the engine file's"),
])
def test_what_does_not_divide_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_rows_may_be_padded_to_the_row_length(shards_folder):
    from functools import partial

    from shards.block import read_manifest, read_shard

    listed = read_manifest(shards_folder)
    short, full = (Stream(listed, partial(read_shard, shards_folder), seed=3, batch=20, lanes=4, padded=padded)
                   for padded in (False, True))
    for batches in zip((b for j in range(0, 200, 20) for b in short.batches(j, 1)),
                       (b for j in range(0, 200, 20) for b in full.batches(j, 1)), strict=True):
        one, other = batches
        width = one.ids.shape[1]
        assert other.ids.shape[1] == listed.row_length == 48
        assert np.array_equal(one.ids, other.ids[:, :width]) and np.array_equal(one.real, other.real[:, :width])
        assert not other.real[:, width:].any() and (other.ids[:, width:] == listed.tokenizer["pad"]).all()


@pytest.mark.parametrize("mask", ["precomputed", "dynamic", "none"])
def test_words_are_the_true_ids_of_what_is_masked(mask, shards_folder):
    """For any mask, over two passes and held-out rows: words put back give the unmasked rows, and nothing else moves."""
    from functools import partial

    from shards.block import read_manifest, read_shard

    listed, masked = read_manifest(shards_folder), 0
    kinds = {}
    for kind, words in (("none", False), (mask, False), (mask, True)):
        how = DynamicMasks(shards_folder, listed, 7) if kind == "dynamic" else kind
        one = Stream(listed, partial(read_shard, shards_folder), seed=3, batch=20, lanes=4, mask=how, words=words)
        last = listed.rows * 3 // 2 // 20 * 20  # well into the second pass
        kinds[kind, words] = [batch for j in range(0, last, 20) for batch in one.batches(j, 5)] + one.held_out(30, 5)
    for plain, without, batch in zip(*(kinds[of] for of in (("none", False), (mask, False), (mask, True))), strict=True):
        assert plain.words is None and without.words is None
        assert np.array_equal(batch.ids, without.ids) and np.array_equal(batch.numbers, plain.numbers)
        row, position, true = batch.words
        assert np.array_equal(plain.ids[row, position], true) and batch.real[row, position].all()
        assert len({*zip(row.tolist(), position.tolist())}) == len(row)
        restored = batch.ids.copy()
        restored[row, position] = true
        assert np.array_equal(restored, plain.ids) and (mask == "none" or {*row.tolist()} == {*range(len(batch.ids))})
        masked += len(row)
    rate = masked / sum(batch.real.sum() for batch in kinds[mask, True])
    assert (rate == 0) if mask == "none" else 0.1 < rate < 0.2  # 15 % of the tokens, rounded row by row; one at least


def test_some_rows_of_a_shard_are_the_same_for_any_ranks(shards_folder):
    from functools import partial

    from shards.block import read_manifest, read_shard

    listed = read_manifest(shards_folder)
    shard, last = listed.shards[0], listed.shards[0].rows - 1
    got = [Stream(listed, partial(read_shard, shards_folder), seed=3, batch=20, lanes=4, rank=rank, world=world,
                  mask="none").some(3) for rank, world in ((0, 1), (1, 2))]
    block = read_shard(shards_folder, shard)
    ends = np.cumsum(block.lengths, dtype=int)
    for batch in got:
        assert sorted(batch.numbers.tolist()) == [0, last // 2, last]
        for row, number in enumerate(batch.numbers):
            own = block.ids[ends[number] - block.lengths[number]:ends[number]]
            assert np.array_equal(batch.ids[row, batch.real[row]], own)
