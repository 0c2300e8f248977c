"""What shards hold, for a person.

    python -m shards.look DIR                         a summary
    python -m shards.look DIR --verify                every count and sum; OK, or the shard that is wrong (exit 1)
    python -m shards.look DIR --row train-00000:17    one row, as text, and as mask set 0 shows it
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from shards.block import Block, Manifest, Shard, read_manifest, read_shard
from shards.stream import Decoded


def summary(folder: Path, manifest: Manifest) -> str:
    counts, mib = manifest.counts, sum(shard.bytes for shard in manifest.shards) / 2**20
    held = sum(shard.rows for shard in manifest.held_out)
    named = ("dropped_empty", "headings", "gutenberg_lines", "unknown_tokens", "truncated_tokens")
    left_out = [f"{counts[name]:,} {name.replace('_', ' ')}" for name in named if counts.get(name)]
    return (
        f"{folder}: {manifest.rows:,} rows, {manifest.tokens:,} tokens in {len(manifest.shards)} shards, "
        f"{mib:,.1f} MiB; {held:,} rows held out in {len(manifest.held_out)}\n"
        f"from {counts['documents']:,} documents ({counts['held_out_documents']:,} held out), "
        f"{counts['sentences']:,} sentences, {counts['tokens']:,} tokens; {', '.join(left_out) or 'nothing left out'}\n"
        f"rows of at most {manifest.row_length}, {counts['mean_length']:.1f} on average; {counts['random_next']:.1%} "
        f"with a random B; {manifest.mask_sets} mask sets of {counts['masked']:.1%}; "
        f"{2**20 * mib / max(1, manifest.tokens):.2f} bytes a token\n"
        f"tokenizer {manifest.tokenizer['name']}, {manifest.tokenizer['vocab_size']:,} ids, "
        f"fingerprint {manifest.tokenizer['fingerprint'][:12]}"
    )


def _check(manifest: Manifest, shard: Shard, block: Block) -> None:
    """What a sum cannot tell: that the arrays of a shard agree.  ValueError names the shard."""
    per_set = block.mask_counts.sum(1, dtype=np.int64)
    facts = {
        "tokens": len(block.ids) == shard.tokens == block.lengths.sum(dtype=np.int64),
        "row lengths": block.lengths.max(initial=0) <= manifest.row_length,
        "segments": bool((block.first <= block.lengths).all()),
        "mask sets": block.mask_counts.shape == (manifest.mask_sets, shard.rows),
        "masks": len(block.mask_positions) == len(block.mask_ids) == per_set.sum(),
        "mask positions": bool((block.mask_positions < np.repeat(np.tile(block.lengths, manifest.mask_sets),
                                                                 block.mask_counts.ravel())).all()),
        "ids": max(block.ids.max(initial=0), block.mask_ids.max(initial=0)) < manifest.tokenizer["vocab_size"],
    }
    if wrong := [name for name, holds in facts.items() if not holds]:
        raise ValueError(f"shard {shard.name}: its {' and '.join(wrong)} do not agree; build it again")


def verify(folder: Path, manifest: Manifest) -> None:
    """ValueError names the first shard that is not as the manifest says."""
    for shard in manifest.shards + manifest.held_out:
        _check(manifest, shard, read_shard(folder, shard))
    found = sum(s.rows for s in manifest.shards), sum(s.tokens for s in manifest.shards)
    if found != (manifest.rows, manifest.tokens):
        raise ValueError(f"{folder}/manifest.json: its shards add up to {found} rows and tokens, but it says "
                         f"{(manifest.rows, manifest.tokens)}; build the shards again")


def show_row(folder: Path, manifest: Manifest, place: str, mask_set: int, tokenizer: str | None) -> str:
    """`place` is SHARD:N, the name with or without .tar, N from 0."""
    from tokenizers import Tokenizer

    from shards.tokenizer import open_tokenizer

    name, _, number = place.rpartition(":")
    shards = {shard.name.removesuffix(".tar"): shard for shard in manifest.shards + manifest.held_out}
    shard = shards.get(name.removesuffix(".tar"))
    if shard is None or not number.isdecimal() or int(number) >= shard.rows:
        raise ValueError(f"--row {place}: give SHARD:N, with " +
                         ", ".join(f"{n}:0..{s.rows - 1}" for n, s in list(shards.items())[:4]))
    if not 0 <= mask_set < manifest.mask_sets:
        raise ValueError(f"--mask-set {mask_set}: the shards have sets 0 to {manifest.mask_sets - 1}")
    vocabulary = open_tokenizer(tokenizer or manifest.tokenizer["name"])
    if vocabulary.fingerprint != manifest.tokenizer["fingerprint"]:
        raise ValueError(f"tokenizer {vocabulary.name}: not the one of these shards (its fingerprint differs); give "
                         f"--tokenizer with the vocabulary of {manifest.tokenizer['name']}")
    block, row = read_shard(folder, shard), int(number)
    decoded = Decoded(block)
    ids, first = decoded.row(row, None)
    shown, _ = decoded.row(row, mask_set)
    where = decoded.masked(row, mask_set)[0].tolist()
    names = Tokenizer.from_str(vocabulary.json)
    text = [names.id_to_token(int(i)) for i in ids]

    def decode(part: np.ndarray) -> str:
        return names.decode(part.tolist(), skip_special_tokens=False)

    changes = [f"{p}: {text[p]} -> {names.id_to_token(int(shown[p]))}" for p in where]
    label = "one segment" if first == len(ids) else "random B" if block.is_random[row] else "B follows A"
    return "\n".join([f"{shard.name} row {row}: {len(ids)} tokens, {label}", f"A       {decode(ids[:first])}",
                      f"B       {decode(ids[first:])}", f"masked  {decode(shown)}",
                      f"set {mask_set}   {len(where)} positions: {', '.join(changes)}"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shards.look", description="What shards hold, for a person.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--verify", action="store_true", help="check every count and sum")
    parser.add_argument("--row", metavar="SHARD:N", help="show one row")
    parser.add_argument("--mask-set", type=int, default=0, metavar="K")
    parser.add_argument("--tokenizer", metavar="DIR_OR_NAME", help="where the manifest's is not to be found")
    options = parser.parse_args(argv)
    try:
        manifest = read_manifest(options.folder)
        if options.row:
            print(show_row(options.folder, manifest, options.row, options.mask_set, options.tokenizer))
            return 0
        print(summary(options.folder, manifest))
        if options.verify:
            verify(options.folder, manifest)
            print(f"OK: {len(manifest.shards) + len(manifest.held_out)} shards are as the manifest says")
    except ValueError as error:
        print("error:", error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
