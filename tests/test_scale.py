"""The integers of a run on 1 to 4,096 ranks: what each rank reads, and what it must open before its first step."""

from concurrent.futures import wait
from functools import lru_cache

import numpy as np
import pytest
from test_stream import Opened, manifest

from pretrain.recipe import Recipe, override
from shards.stream import Stream, micro_rows

WORLDS = [1, 2, 3, 8, 48, 512, 4096]
MOST = 16  # the most rows held at once
UNEVEN = tuple(np.random.Generator(np.random.PCG64(0)).integers(50, 800, 100).tolist())
EVEN = (4 * 4096,) * 25  # 50 batches a pass


def lanes(world: int) -> int:
    """4,096 or, for 3 and 48 ranks, what they divide."""
    return 4096 if 4096 % world == 0 else 3072


@lru_cache
def planned(sizes: tuple[int, ...], world: int):
    """As pretrain.plan does."""
    recipe = override(Recipe(), [f"batch={2 * lanes(world)}", f"lanes={lanes(world)}"]).resolved([sum(sizes)])[0]
    return manifest(list(sizes)), recipe


def share(sizes: tuple[int, ...], rank: int, world: int, opened=None) -> Stream:
    made, recipe = planned(sizes, world)
    return Stream(made, opened or Opened(), seed=recipe.seed, batch=recipe.batch, lanes=recipe.lanes, rank=rank, world=world,
                  mask="none")


@pytest.mark.parametrize("world", WORLDS)
def test_a_pass_over_all_ranks_is_every_row_once(world):
    """And what a rank holds at once is the same share of the batch, without a rest, on every rank."""
    times = np.zeros(sum(UNEVEN), int)
    for rank in range(world):
        one = share(UNEVEN, rank, world)
        rows, micro = len(one.mine), micro_rows(len(one.mine), MOST)
        assert rows * world == one.batch and rows % micro == 0 and micro <= MOST
        keys, entries = one.plan(0, -(-sum(UNEVEN) // one.batch))
        first = keys < len(UNEVEN)  # the last batch spans two passes
        np.add.at(times, one.first_row[keys[first]] + entries[first], 1)
    assert (times == 1).all()


@pytest.mark.parametrize("world", WORLDS)
def test_the_first_batch_needs_two_shards_a_lane_at_most(world):
    """Wherever in a pass a run begins or goes on: so no more on 4,096 ranks than on one, and not more late than early."""
    for rank in {0, world // 2, world - 1}:
        one = share(EVEN, rank, world)
        needed = [len({*one.plan(place * one.batch, 1)[0].tolist()}) for place in (0, 5, 49, 5_000)]
        assert max(needed) <= min(2 * lanes(world) // world, 2 * len(EVEN))


@pytest.mark.parametrize("place", [0, 49, 5_000])
def test_a_rank_of_4096_opens_four_shards_at_most(place):
    """Those of its first batch, and those that it reads ahead."""
    for rank in (0, 4095):
        opened = Opened()
        one = share(EVEN, rank, 4096, opened)
        assert len(one.batches(place * one.batch, MOST)[0].ids) == 2
        wait(one.decoded.values())
        assert 1 <= len(opened.names) <= 4
