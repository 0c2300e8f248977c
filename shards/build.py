"""Make shards of NSP rows with precomputed masks from raw text.

    python -m shards.build python-docs --tokenizer bert-base-uncased --out data/shards
    python -m shards.build wiki.train.tokens 'books/*.txt' --tokenizer DIR --out DIR --workers 8

Two phases: documents are tokenized once, in parallel, into a store on disk (OUT/.store); then every shard, a contiguous
range of documents, is a pure function of (store, settings, seed, its number).  So any number of workers writes the same
bytes.  Ends with manifest.json; a build that fails leaves nothing.
"""

import argparse
import fcntl
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shards import block, pairs
from shards.corpus import Source
from shards.look import summary
from shards.store import WORKER, Store, in_order, start_worker, write_store
from shards.tokenizer import Vocabulary, open_tokenizer

SHARD_BYTES = 16 * 2**20
HELD_OUT, TRAIN_ROWS, TRAIN_MASKS, HELD_ROWS, HELD_MASKS = range(5)  # streams of chance: PCG64([seed, stream, n])


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the bytes of a build depend on; the manifest states them."""

    sources: list  # name, files, bytes
    tokenizer: str  # fingerprint
    sentences: str
    row_length: int
    one_segment: bool
    masking: str  # whole-word or token
    mask_sets: int
    held_out: float  # share of the documents
    shards: int | None  # None: about SHARD_BYTES each
    seed: int

    def __post_init__(self):
        for name, low, high in (("row_length", 8, 8192), ("mask_sets", 1, 255), ("held_out", 0, 0.9),
                                ("shards", 1, 99_999), ("seed", 0, 2**63)):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be between {low:,} and {high:,}")


def held_out_documents(count: int, share: float, seed: int) -> np.ndarray:
    """bool `count`: drawn from (seed, number of the document); one at least, but none of less than three."""
    drawn = np.random.Generator(np.random.PCG64([seed, HELD_OUT, 0])).random(count)
    held = (drawn < share) & (count >= 3)
    if share and count >= 3 and not held.any():
        held[drawn.argmin()] = True
    return held


def _ranges(tokens: np.ndarray, shards: int) -> list[tuple[int, int]]:
    """Contiguous ranges of documents of about equal tokens; fewer where documents are larger than a share."""
    ends = np.cumsum(tokens)
    edges = np.searchsorted(ends, ends[-1] * np.arange(1, shards) / shards) + 1
    edges = np.unique(np.concatenate([[0], edges, [len(tokens)]]))
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def _plan(settings: Settings, store: Store, held: np.ndarray) -> list[tuple]:
    """Tasks (train or held, number, first, last): places in the list of training or of held-out documents."""
    tokens = np.diff(store.sentences[store.documents])
    # Rows hold about 1.25 times the store's tokens (special tokens and random second segments, less what is cut), and
    # each mask set 15 % of them again, with a position.
    width, position = store.ids.itemsize, np.dtype(block.position_type(settings.row_length)).itemsize
    estimate = 1.25 * tokens[~held].sum() * (width + 0.15 * settings.mask_sets * (width + position))
    shards = settings.shards or max(1, round(estimate / SHARD_BYTES))
    train = _ranges(tokens[~held], shards)
    if settings.shards and len(train) < settings.shards:
        raise ValueError(f"--shards {settings.shards}: the documents fill at most {len(train)} (a shard holds whole "
                         "documents); give that or less")
    tasks = [("train", n, first, last) for n, (first, last) in enumerate(train)]
    if held.any():
        some = max(1, round(len(train) * tokens[held].sum() / max(1, tokens[~held].sum())))
        tasks += [("held", n, first, last) for n, (first, last) in enumerate(_ranges(tokens[held], some))]
    return tasks


def _make_shard(task: tuple) -> tuple:
    """Write one shard -> (Shard, counts of its rows)."""
    kind, number, first, last = task
    settings, vocabulary = WORKER["settings"], WORKER["vocabulary"]
    store = Store.opened(WORKER["store"], block.id_type(vocabulary.size))
    held = held_out_documents(len(store.documents) - 1, settings.held_out, settings.seed)
    pool = np.flatnonzero(held if kind == "held" else ~held)
    streams = (HELD_ROWS, HELD_MASKS) if kind == "held" else (TRAIN_ROWS, TRAIN_MASKS)
    for_rows, for_masks = (np.random.Generator(np.random.PCG64([settings.seed, s, number])) for s in streams)
    rows = pairs.draw_rows(store, pool, first, last, settings.row_length, settings.one_segment, for_rows)
    counts = Counter(truncated_tokens=int(rows.truncated.sum()), random_rows=int(rows.is_random.sum()), masked_tokens=0)

    def counted():
        for part in pairs.make_blocks(store, rows, vocabulary, for_masks, row_length=settings.row_length,
                                      mask_sets=settings.mask_sets, whole_word=settings.masking == "whole-word"):
            counts["masked_tokens"] += len(part.mask_positions)
            yield part

    shard = block.write_shard(WORKER["store"].parent / f"{kind}-{number:05d}.tar", counted())
    return shard, counts


def _clear(out: Path) -> None:
    """Take away what an unfinished build left, known by its store."""
    if (out / ".store").exists():
        if not (out / "manifest.json").exists():
            for path in [*out.glob("train-*.tar*"), *out.glob("held-*.tar*")]:
                path.unlink()
        shutil.rmtree(out / ".store")


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold OUT for one build; what this build wrote there goes when it fails."""
    created = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _clear(out)
        try:
            yield
        finally:
            _clear(out)
            if created and not any(out.iterdir()):
                out.rmdir()
    except BlockingIOError:
        raise ValueError(f"--out {out}: another build is writing there; wait for it, or give another folder") from None
    finally:
        os.close(lock)


def _is_built(out: Path, settings: Settings) -> bool:
    """Whether OUT holds these very shards.  ValueError names the settings that differ."""
    if not (out / "manifest.json").exists():
        if any(out.glob("train-*.tar")):
            raise ValueError(f"--out {out}: holds shards without a manifest; remove them, or give another folder")
        return False
    there, here = block.read_manifest(out).settings, json.loads(json.dumps(asdict(settings)))
    differ = [f"{name}: {there.get(name)} there, {here.get(name)} here"
              for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]
    if differ:
        raise ValueError(f"--out {out}: holds shards of other settings ({'; '.join(differ)}); "
                         "remove them, or give another folder")
    return True


@contextmanager
def _workers(number: int, *setup) -> Iterator:
    """A pool of processes, or None where this process does the work."""
    if number == 1:
        start_worker(*setup)
        yield None
        return
    pool = ProcessPoolExecutor(number, get_context("spawn"), start_worker, setup)  # spawn inherits no torch, no threads
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _opened_sources(names: list[str], sentences: str) -> list[Source]:
    sources = [Source.opened(name, sentences) for name in names]
    named = Counter(path.resolve() for source in sources for path, _ in source.files)
    twice = [str(path) for path, times in named.items() if times > 1] or [n for n, k in Counter(names).items() if k > 1]
    if twice:  # a copy of a held-out document would stand in training
        raise ValueError(f"source {twice[0]}: given more than once; name it once")
    return sources


def _make_shards(settings: Settings, folder: Path, counts: Counter, vocabulary: Vocabulary, pool,
                 workers: int) -> tuple:
    """All shards of a store -> (training shards, held-out shards); `counts` gains what came out."""
    if not counts["documents"]:
        raise ValueError("no document with a sentence in it; give other sources")
    store = Store.opened(folder, block.id_type(vocabulary.size))
    held = held_out_documents(counts["documents"], settings.held_out, settings.seed)
    if (left := int((~held).sum())) < (1 if settings.one_segment else 2):
        raise ValueError(f"documents to train on: {left}, but random second segments need two at least; "
                         "give more text, or --one-segment for rows without a second segment")
    counts["held_out_documents"] = int(held.sum())
    shards = {"train": [], "held": []}
    tasks = tqdm(_plan(settings, store, held), desc="rows", unit="shard", disable=None)
    for (kind, *_), (shard, found) in in_order(pool, _make_shard, tasks, 2 * workers):
        shards[kind].append(shard)
        if kind == "train":
            counts.update(found)
    return tuple(shards["train"]), tuple(shards["held"])


def build(sources: list[str], tokenizer: str, out: Path, *, workers: int, **settings) -> block.Manifest:
    """Build shards of `sources` in `out` -> Manifest.  ValueError, one line, for everything a person can mend."""
    if workers < 1:
        raise ValueError(f"--workers {workers}: must be 1 or more")
    opened = _opened_sources(sources, settings["sentences"])
    vocabulary = open_tokenizer(tokenizer)
    listed = [{"name": source.name, "files": len(source.files), "bytes": source.bytes} for source in opened]
    settings = Settings(sources=listed, tokenizer=vocabulary.fingerprint, **settings)
    with _locked(out):
        if _is_built(out, settings):
            print(f"{out}: already built with these settings; nothing to do")
            return block.read_manifest(out)
        for source in opened:
            print(source)
        (out / ".store").mkdir()
        with _workers(workers, vocabulary, settings, out / ".store") as pool:
            counts = write_store(out / ".store", opened, pool, workers)
            train, held = _make_shards(settings, out / ".store", counts, vocabulary, pool, workers)
        rows, tokens = sum(shard.rows for shard in train), sum(shard.tokens for shard in train)
        known = {name: getattr(vocabulary, name) for name in ("fingerprint", "name", "pad", "cls", "sep", "mask")}
        rates = {"masked": counts.pop("masked_tokens") / settings.mask_sets / tokens,
                 "random_next": counts.pop("random_rows") / rows, "mean_length": tokens / rows}
        manifest = block.Manifest(
            format=block.FORMAT, tokenizer=known | {"vocab_size": vocabulary.size}, settings=asdict(settings),
            row_length=settings.row_length, mask_sets=settings.mask_sets, rows=rows, tokens=tokens, shards=train,
            held_out=held, counts=dict(counts) | {name: round(rate, 5) for name, rate in rates.items()})
        block.write_manifest(out, manifest)
    return manifest


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m shards.build", description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda text: sys.exit(_failed(text))  # one line, without the usage
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="text file, glob, folder of .txt, WikiText file, or python-docs")
    add("--tokenizer", required=True, metavar="DIR_OR_NAME", help="what transformers.AutoTokenizer opens")
    add("--out", required=True, type=Path, metavar="DIR")
    add("--row-length", type=int, default=128, metavar="L", help="tokens of a row at most, special ones included")
    add("--mask-sets", type=int, default=3, metavar="M", help="independent masks of each row, one a pass")
    add("--held-out", type=float, default=0.005, metavar="SHARE", help="of the documents, kept out of training")
    add("--shards", type=int, metavar="N", help="training shards; without it they are about 16 MB")
    add("--seed", type=int, default=0)
    cores = len(os.sched_getaffinity(0))
    add("--workers", type=int, default=cores, metavar="W", help="processes; any number writes the same bytes")
    add("--masking", choices=("whole-word", "token"), default="whole-word")
    add("--one-segment", action="store_true", help="rows [CLS] A [SEP], without second segments")
    add("--sentences", choices=("auto", "lines", "prose"), default="auto", help="what text files hold")
    return parser.parse_args(argv)


def _failed(reason) -> int:
    print("error:", " ".join(str(reason).split()), file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    settings = vars(_arguments(argv))
    try:
        manifest = build(**settings)
    except (ValueError, OSError) as error:
        return _failed(error)
    except BrokenProcessPool:
        return _failed("a worker was killed (out of memory?); run again, perhaps with fewer --workers")
    except KeyboardInterrupt:
        return _failed("stopped; nothing was left behind")
    print(summary(settings["out"], manifest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
