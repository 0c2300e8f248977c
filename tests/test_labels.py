"""Masked words as labels, and rows padded to their full length: what the stream gives where the objective asks for it."""

from functools import partial

import numpy as np
import pytest

from shards.block import read_manifest, read_shard
from shards.dynamic import DynamicMasks
from shards.stream import Stream


def batches(folder, mask: str, most: int = 5, **how) -> list:
    manifest = read_manifest(folder)
    masks = DynamicMasks(folder, manifest, 7) if mask == "dynamic" else mask
    stream = Stream(manifest, partial(read_shard, folder), seed=3, batch=20, lanes=4, mask=masks, **how)
    last = manifest.rows * 3 // 2 // 20 * 20  # well into the second pass
    return [batch for j in range(0, last, 20) for batch in stream.batches(j, most)] + stream.held_out(30, most)


@pytest.mark.parametrize("mask", ["precomputed", "dynamic"])
def test_labels_are_the_true_ids_of_masked_positions(mask, shards_folder):
    plain, masked, labelled = (batches(shards_folder, kind, labels=given) for kind, given in
                               (("none", False), (mask, False), (mask, True)))
    assert all(batch.labels is None for batch in plain + masked)
    manifest, counted = read_manifest(shards_folder), 0
    budgets = {}
    first = 0
    for shard in manifest.shards:
        counts = read_shard(shards_folder, shard).mask_counts
        budgets |= {first + row: counts[:, row] for row in range(shard.rows)}
        first += shard.rows
    for own, without, batch in zip(plain, masked, labelled, strict=True):
        where = batch.labels != -100
        assert np.array_equal(batch.ids, without.ids) and np.array_equal(batch.numbers, own.numbers)
        assert np.array_equal(np.where(where, batch.labels, batch.ids), own.ids)  # they and what is left are the row
        assert not (where & ~batch.real).any() and where.any(1).all()
        for number, count in zip(batch.numbers.tolist(), where.sum(1).tolist(), strict=True):
            if mask == "precomputed" and number in budgets:
                assert count in budgets[number]
                counted += 1
    assert counted or mask == "dynamic"


def test_without_masks_there_are_no_labels(shards_folder):
    assert all((batch.labels == -100).all() for batch in batches(shards_folder, "none", labels=True))


def test_rows_may_be_padded_to_the_row_length(shards_folder):
    short, full = batches(shards_folder, "precomputed", 1), batches(shards_folder, "precomputed", 1, padded=True, labels=True)
    assert {batch.ids.shape[1] for batch in full} == {48} and min(batch.ids.shape[1] for batch in short) < 48
    for one, other in zip(short, full, strict=True):
        width = one.ids.shape[1]
        assert np.array_equal(one.ids, other.ids[:, :width]) and np.array_equal(one.real, other.real[:, :width])
        assert not other.real[:, width:].any() and (other.labels[:, width:] == -100).all()
