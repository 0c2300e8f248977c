"""Make shards of NSP rows with precomputed masks from raw text.

Documents are tokenized once into OUT/.store; every shard, a range of documents, is a pure function of (store, settings, number).
Processes of the same command share the work: each makes the next file that is not there and whose lock no living one has."""

import argparse
import fcntl
import json
import os
import shutil
import sys
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import takewhile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from shards import block, pairs, store as stored
from shards.corpus import Tally
from shards.look import summary
from shards.sources import Source
from shards.tokenizer import Vocabulary, open_tokenizer

LIMITS = dict(row_length=(8, 8192), mask_sets=(1, 255), held_out=(0, 0.9), shards=(1, 99_999), seed=(0, 2**63), workers=(1, 999))


def _make(store: Path, result: Path, make: Callable, file: Path, *how, wait: bool = False):
    """Make a file -> True.  None where another process is at it, unless to wait, or it or what is made of it is there."""
    with open(store / "locks" / file.name, "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                return
            print(f"waits for {file.name}, which another process makes", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not file.exists() and not result.exists():  # in this order: the result is there before its files go
            return make(file, *how) or True


def _attempt(store: Path, pool, ahead: int, result: Path, bar: tqdm, step, make, tasks, finish) -> None:
    """Make the file that each task begins with, then, unless a process that was at one died, the result of all."""
    files, waiting = [], deque()
    with bar:
        for task in takewhile(lambda _: not result.exists(), tasks):
            files.append(task[0])
            waiting.append(pool.submit(_make, store, result, make, *task))
            if len(waiting) >= ahead:
                step(waiting.popleft().result())
        for future in waiting:
            step(future.result())
    if not any(_make(store, result, bool, file, wait=True) for file in files if not file.exists()):  # bool: was it made?
        _make(store, result, finish, result, files, wait=True)


def _make_shard(entry: Path, first: int, last: int) -> None:
    """Write one shard, then into .store its entry for the manifest and the counts of training rows."""
    kind, _, number = entry.stem.partition("-")
    settings, vocabulary = stored.WORKER["settings"], stored.WORKER["vocabulary"]
    store, counts = stored.Store.opened(entry.parent / "joined", kind, np.min_scalar_type(vocabulary.size - 1)), Counter()
    draws = [block.chance(settings.seed, stream, int(number)) for stream in stored.DRAWS[kind]]
    blocks = pairs.make_blocks(store, first, last, vocabulary, settings, *draws, counts)
    shard = block.write_shard(entry.parent.with_name(f"{entry.stem}.tar"), blocks)
    block.write_json(entry, [vars(shard), counts if kind == "train" else {}])


def _work(attempt: Callable, store: Path, settings, vocabulary: Vocabulary, sources: list[Source], skip: bool) -> None:
    """Tokenize all sources in pieces and join these; draw the rows of all shards and list these in the manifest."""
    planned, manifest, sizes = store / "joined/plan.json", store.with_name("manifest.json"), [source.bytes for source in sources]
    while not planned.exists():
        tally, total = Tally(skip), None if None in sizes else sum(sizes)
        bar = tqdm(desc="tokenize", total=total, unit="B", unit_scale=True, disable=None)
        pieces = stored.cut_pieces(sources, tally, settings.seed, store / "pieces")
        finish = partial(stored.join, settings, tally, vocabulary.size)
        attempt(planned, bar, lambda _: bar.update(tally.read - bar.n), stored.make_piece, pieces, finish)
    counts, shards = json.loads(planned.read_text())
    tasks = [(store / f"{name}.json", *span) for name, span in shards.items()]
    while not manifest.exists():
        bar = tqdm(desc="rows", total=len(tasks), unit="shard", disable=None)
        attempt(manifest, bar, lambda _: bar.update(), _make_shard, tasks, partial(_finish, settings, vocabulary, counts))


def _share(out: Path, settings, vocabulary: Vocabulary, sources: list[Source], workers: int, skip: bool) -> None:
    """Work with other processes until the manifest is there.  `settings` is what the bytes depend on."""
    store, manifest = out / ".store", out / "manifest.json"
    begun, planned = store / "settings.json", store / "joined/plan.json"
    pool = ThreadPoolExecutor if workers == 1 else partial(ProcessPoolExecutor, mp_context=get_context("spawn"))  # no torch
    (store / "locks").mkdir(parents=True, exist_ok=True)
    _make(store, begun, block.write_json, begun, vars(settings), wait=True)
    with open(begun, "r+b") as alive:
        fcntl.flock(alive, fcntl.LOCK_SH)
        built = _is_built(out, settings)  # perhaps another process began, or has just ended
        try:
            if not built:
                with pool(workers, initializer=stored.start_worker, initargs=(vocabulary, settings)) as pool:
                    _work(partial(_attempt, store, pool, workers + 2), store, settings, vocabulary, sources, skip)
        finally:
            useless = sys.exc_info()[0] is stored.NoPlan
            if useless or manifest.exists() or not planned.exists() and not any(store.glob("pieces/*.npz")):
                with suppress(OSError):  # the last process to end removes what nothing goes on with; OUT too where it is empty
                    fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(store, ignore_errors=True)
                    out.rmdir()


def _finish(settings, vocabulary: Vocabulary, counts: dict, manifest: Path, entries: list[Path]) -> None:
    """Write the manifest from what the shards left; its counts are those of the join and, over training rows, these."""
    shards, counted = zip(*(json.loads(entry.read_text()) for entry in entries), strict=True)
    train, held = ([shard for shard in shards if shard["name"].startswith(kind)] for kind in stored.DRAWS)
    found = sum(map(Counter, counted), Counter())
    counts |= {
        "masked": found["masked_tokens"] / settings.mask_sets / found["tokens"],  # share of the tokens
        "random_next": found["random"] / found["rows"],  # share of the rows whose B is random
        "random_of_one": (found["random"] - found["random_of_several"]) / max(1, found["rows"] - found["chunks_of_several"]),
        "random_of_several": found["random_of_several"] / max(1, found["chunks_of_several"]),
        "mean_length": found["tokens"] / found["rows"], "truncated_tokens": found["truncated_tokens"]}
    for path in manifest.parent.glob("*.part"):  # of killed workers
        path.unlink(missing_ok=True)
    flags = (vocabulary.special + 2 * vocabulary.begins_word + 4 * vocabulary.may_replace).astype(np.uint8)
    block.write_json(manifest, dict(
        format=block.FORMAT, tokenizer=vocabulary.stated(), settings=vars(settings), row_length=settings.row_length,
        mask_sets=settings.mask_sets, rows=found["rows"], tokens=found["tokens"], shards=train, held_out=held,
        counts=counts, vocabulary=block.write(manifest.with_name("vocabulary.npy"), block.npy(flags))))


def _is_built(out: Path, settings) -> bool:
    """Whether OUT holds these very shards.  ValueError where it holds others, built or begun."""
    started, built = (begun := out / ".store/settings.json").exists(), (out / "manifest.json").exists()  # a store goes later
    if not started and not built and any(out.glob("train-*.tar")):
        raise ValueError(f"--out {out}: holds shards without a manifest; remove them, or give another folder")
    here = vars(settings)
    there = block.read_manifest(out).settings if built else json.loads(begun.read_text()) if started else here
    if differ := [f"{name}: {there.get(name)} there, {here[name]} here" for name in here if there.get(name) != here[name]]:
        raise ValueError(f"--out {out}: holds shards of other settings ({'; '.join(differ)}); remove "
                         f"{'them' if built else begun.parent}, give those settings, or another folder")
    return built


def build(names: list[str], tokenizer: str, out: Path, *, workers: int, on_error: str = "stop", **settings) -> block.Manifest:
    """Build shards of sources in `out` -> Manifest.  ValueError, one line, for everything a person can mend."""
    for name, (low, high) in LIMITS.items():
        value = (settings | {"workers": workers})[name]
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be between {low:,} and {high:,}")
    sources = [Source.opened(name, settings["sentences"]) for name in names]
    named = [place for source in sources for place in ([str(file.resolve()) for file, _ in source.files] or [source.name])]
    if len(set(named)) < len(named):  # a copy of a held-out document would be trained on
        raise ValueError(f"source {max(named, key=named.count)}: given more than once; name it once")
    vocabulary = open_tokenizer(tokenizer)
    settings = argparse.Namespace(sources=[source.stated() for source in sources], tokenizer=vocabulary.fingerprint, **settings)
    built = _is_built(out, settings)
    print(*[f"{out}: already built with these settings; nothing to do"] if built else sources, sep="\n")
    while not _is_built(out, settings) or (out / ".store").exists():  # of a build killed after its manifest
        try:
            _share(out, settings, vocabulary, sources, workers, on_error == "skip")
            break
        except FileNotFoundError:  # the last of the others ended, and removed the store, before this one had a hold on it
            if (out / ".store").exists():
                raise
    return block.read_manifest(out)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m shards.build", description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda text: parser.exit(2, f"error: {' '.join(text.split())}\n")  # one line, without the usage
    add = parser.add_argument
    add("names", nargs="+", metavar="SOURCE[=WEIGHT]", help="text, JSON lines, Parquet, globs, folders, WikiText, ...")
    add("--tokenizer", required=True, metavar="DIR_OR_NAME", help="what transformers.AutoTokenizer opens, or a .model file")
    add("--out", required=True, type=Path, metavar="DIR")
    add("--row-length", type=int, default=128, metavar="L", help="tokens of a row at most, special ones included")
    add("--mask-sets", type=int, default=3, metavar="M", help="independent masks of each row, one a pass")
    add("--held-out", type=float, default=0.005, metavar="SHARE", help="of the documents, kept out of training")
    add("--shards", type=int, metavar="N", help="training shards; without it they are about 16 MB")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="W", help="any number writes the same bytes")
    add("--masking", choices=("whole-word", "token"), default="whole-word")
    add("--one-segment", action="store_true", help="rows [CLS] A [SEP], without second segments")
    add("--sentences", choices=("auto", "lines", "prose"), default="auto", help="what text files hold")
    add("--dedup", action="store_true", help="drop documents whose normalized text has been seen")
    add("--on-error", choices=("stop", "skip"), default="stop", help="bad records end the build, or are counted and named")
    add("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    settings = vars(parser.parse_args(argv))
    del settings["local_rank"]
    try:
        print(summary(settings["out"], build(**settings)))
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--out {settings['out']}: {error}; make room or mend it, then the same command goes on")
    except BrokenExecutor:
        parser.error("a worker was killed (out of memory?); the same command goes on, perhaps with fewer --workers")
    except KeyboardInterrupt:
        parser.error("stopped; the same command goes on")


if __name__ == "__main__":
    main()
