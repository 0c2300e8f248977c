"""What shards hold, for a person: `python -m shards.look --help`."""

import argparse
from pathlib import Path

import numpy as np

from shards.block import Manifest, read_manifest, read_shard
from shards.tokenizer import auto_tokenizer, fingerprint


def summary(folder: Path, manifest: Manifest) -> str:
    size, held = sum(shard.bytes for shard in manifest.shards), sum(shard.rows for shard in manifest.held_out)
    counts = dict(manifest.counts)
    sources, bad = counts.pop("sources"), counts.pop("bad")
    return "\n".join([
        f"{folder}: {manifest.rows:,} rows of at most {manifest.row_length}, {manifest.tokens:,} tokens in "
        f"{len(manifest.shards)} shards, {size / 2**20:,.1f} MiB, {size / manifest.tokens:.2f} bytes a token with "
        f"{manifest.mask_sets} mask sets; {held:,} rows held out in {len(manifest.held_out)}",
        f"tokenizer {manifest.tokenizer['name']}, {manifest.tokenizer['vocab_size']:,} ids",
        *(f"{name.replace('_', ' ')}: {n:{',' if isinstance(n, int) else '.4f'}}" for name, n in counts.items()),
        *(f"source {each['name']}: weight {each['weight']:g}, {each['share']:.1%} of the tokens" for each in sources),
        *(f"left out: {record}" for record in bad)])


def show_row(folder: Path, manifest: Manifest, place: str, tokenizer: str | None) -> str:
    """`place` is SHARD:N, the name with or without .tar, N from 0."""
    name, _, number = place.rpartition(":")
    shards = {shard.name.removesuffix(".tar"): shard for shard in manifest.shards + manifest.held_out}
    shard = shards.get(name.removesuffix(".tar"))
    if shard is None or not number.isdecimal() or int(number) >= shard.rows:
        raise ValueError(f"--row {place}: give SHARD:N, such as train-00000:0 to train-00000:{manifest.shards[0].rows - 1}")
    opened, theirs = auto_tokenizer(tokenizer or manifest.tokenizer["name"]), manifest.tokenizer
    if fingerprint(opened) != theirs["fingerprint"]:
        raise ValueError(f"tokenizer {tokenizer or theirs['name']}: not the one of these shards; give {theirs['name']}'s")
    block, row = read_shard(folder, shard), int(number)
    ids, first = np.split(block.ids, np.cumsum(block.lengths))[row], block.first[row]
    shown = {"A": ids[:first], "B": ids[first:]}
    ends = np.cumsum(block.mask_counts)[:-1]  # set by set, row by row
    positions, others = (np.split(flat, ends)[row::len(block.lengths)] for flat in (block.mask_positions, block.mask_ids))
    for mask_set, (where, other) in enumerate(zip(positions, others, strict=True)):
        shown[f"set {mask_set}"] = ids.copy()
        shown[f"set {mask_set}"][where] = other
    label = "one segment" if first == len(ids) else "random B" if block.is_random[row] else "B follows A"
    return "\n".join([f"{shard.name} row {row}: {len(ids)} tokens, {label}",
                      *(f"{name:8}{opened.backend_tokenizer.decode(part.tolist(), False)}" for name, part in shown.items())])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m shards.look", description="What shards hold, for a person.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--verify", action="store_true", help="check the sum and rows of every shard; exit 1 where one is wrong")
    parser.add_argument("--row", metavar="SHARD:N", help="one row, such as train-00000:17, as text and as each mask set shows it")
    parser.add_argument("--tokenizer", metavar="DIR_OR_NAME", help="where the manifest's is not to be found")
    options = parser.parse_args(argv)
    try:
        manifest = read_manifest(options.folder)
        print(show_row(options.folder, manifest, options.row, options.tokenizer) if options.row else
              summary(options.folder, manifest))
        if options.verify:
            for shard in manifest.shards + manifest.held_out:
                read_shard(options.folder, shard)
            print(f"OK: {len(manifest.shards) + len(manifest.held_out)} shards are as the manifest says")
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
