"""How fast rows come out of the stream, and what that leaves of a training step.

    python tests/bench/stream.py [--shards DIR]         rows/s of one process; without DIR on random tokens, made here
    python tests/bench/stream.py --run runs/general     data wait of a run, from its metrics.jsonl

At least 300,000 rows/s are asked for (100,000 with mask=dynamic), and a data wait below 1 % of the time of a step.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from shards import block  # noqa: E402
from shards.stream import DynamicMasks, Stream  # noqa: E402

WORDS, LENGTH, SHARD_ROWS = 30_522, 128, 4096


def random_shards(folder: Path, shards: int = 96) -> None:
    """Rows as a build leaves them at row length 128: one in ten is short, three mask sets of 15 %, two words of three tokens."""
    rng = np.random.Generator(np.random.PCG64(0))
    listed = []
    for number in range(shards):
        blocks = []
        for _ in range(SHARD_ROWS // block.BLOCK_ROWS):
            rows = block.BLOCK_ROWS
            lengths = np.where(rng.random(rows) < 0.1, rng.integers(10, LENGTH, rows), rng.integers(115, LENGTH + 1, rows))
            ids = rng.integers(1000, WORDS, lengths.sum())
            begins = np.cumsum(lengths) - lengths
            ids[begins] = 101
            counts = np.tile(np.maximum(1, np.rint(0.15 * lengths)), (3, 1)).astype(np.uint16)
            spread = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts.ravel(), counts.ravel())
            blocks.append(block.Block(
                ids.astype(np.uint16), lengths.astype(np.uint16), (lengths // 2).astype(np.uint16), np.zeros(rows, np.uint8),
                counts, (1 + 5 * spread).astype(np.uint8), np.full(counts.sum(), 103, np.uint16)))
        listed.append(block.write_shard(folder / f"train-{number:05d}.tar", blocks))
    flags = np.where(np.arange(WORDS) < 1000, 1 | 2, 4 | 2 * (np.arange(WORDS) % 3 > 0))
    block.write_json(folder / "manifest.json", asdict(block.Manifest(
        format=block.FORMAT, tokenizer={"pad": 0, "mask": 103}, settings={"masking": "whole-word"}, row_length=LENGTH,
        mask_sets=3, rows=sum(s.rows for s in listed), tokens=sum(s.tokens for s in listed), shards=tuple(listed), held_out=(),
        counts={}, vocabulary=block.write(folder / "vocabulary.npy", block.npy(flags.astype(np.uint8))))))


def rates(folder: Path, mask: str, batch: int, world: int, most: int) -> tuple[float, float, float]:
    """Rows/s, tokens/s and rows for each second of CPU time of rank 0 over a pass; opening, sums and the start included."""
    manifest = block.read_manifest(folder)
    masks = DynamicMasks(folder, manifest, 0) if mask == "dynamic" else mask
    lanes = min(64, batch)
    rows = tokens = 0
    begin, busy = time.perf_counter(), time.process_time()
    stream = Stream(manifest, partial(block.read_shard, folder), seed=0, batch=batch, lanes=lanes, world=world, mask=masks)
    for j in range(0, manifest.rows, batch):
        for micro in stream.batches(j, most):
            rows += len(micro.ids)
            tokens += int(micro.real.sum())
    seconds = time.perf_counter() - begin
    return rows / seconds, tokens / seconds, rows / (time.process_time() - busy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path)
    parser.add_argument("--run", type=Path)
    given = parser.parse_args()
    if given.run:
        lines = [json.loads(line) for line in (given.run / "metrics.jsonl").read_text().splitlines()]
        waits = [line["data_wait"] for line in lines if "data_wait" in line]
        print(f"data wait: {np.mean(waits):.4%} of the time, at most {max(waits):.4%} between two logged lines")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.shards or Path(scratch)
        if not given.shards:
            random_shards(folder)
        for batch, world in ((256, 1), (1024, 8)):
            for mask in ("precomputed", "none", "dynamic"):
                rows, tokens, busy = rates(folder, mask, batch, world, 32)
                print(f"batch {batch}, {world} ranks, micro batch 32, {mask}: {rows:,.0f} rows/s, {tokens:,.0f} tokens/s; "
                      f"{busy:,.0f} rows for each second of CPU time")


if __name__ == "__main__":
    main()
