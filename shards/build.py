"""Make shards of NSP rows with precomputed masks from raw text.

    python -m shards.build wikitext:wikitext-103-raw-v1 --tokenizer bert-base-uncased --out data/shards
    python -m shards.build wiki.train.tokens 'books/*.txt=2' --tokenizer DIR --out DIR --workers 8

Documents are tokenized once into OUT/.store; every shard, a range of documents, is a pure function of (store, settings, number):
any number of workers, parts and machines writes the same bytes, and a killed build goes on with the same command.
"""

import argparse
import json
import os
import shutil
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from shards import block, pairs
from shards import store as stored
from shards.corpus import Tally
from shards.look import summary
from shards.parts import Part, Unfinished
from shards.sources import Source
from shards.tokenizer import Vocabulary, open_tokenizer

LIMITS = {"row_length": (8, 8192), "mask_sets": (1, 255), "held_out": (0, 0.9), "shards": (1, 99_999), "seed": (0, 2**63),
          "workers": (1, 999)}


def _make_shard(task: tuple[Path, int, int]) -> None:
    """Write one shard, then into .store its entry for the manifest and the counts of training rows."""
    entry, first, last = task
    kind, _, number = entry.stem.partition("-")
    settings, vocabulary = stored.WORKER["settings"], stored.WORKER["vocabulary"]
    store, counts = stored.Store.opened(entry.parent / "joined" / kind, block.id_type(vocabulary.size)), Counter()
    draws = [stored.chance(settings.seed, stream, int(number)) for stream in stored.DRAWS[kind]]
    blocks = pairs.make_blocks(store, first, last, vocabulary, settings, *draws, counts)
    shard = block.write_shard(entry.parent.with_name(f"{entry.stem}.tar"), blocks)
    block.write_json(entry, [asdict(shard), counts if kind == "train" else {}])


def _run(settings, vocabulary: Vocabulary, sources: list[Source], part: Part, workers: int, tally: Tally) -> None:
    """This part's work: pieces, then shards; one part joins each.  `settings` is what the bytes depend on."""
    out, store, pieces, entries = part.store.parent, part.store, [], []
    planned, sizes, documents, tokens = store / "joined" / "plan.json", [source.bytes for source in sources], 0, 0
    pool = ThreadPoolExecutor if workers == 1 else partial(ProcessPoolExecutor, mp_context=get_context("spawn"))  # no torch
    with pool(workers, initializer=stored.start_worker, initargs=(vocabulary, settings)) as pool:
        each = partial(stored.in_order, pool, workers + 2)
        if not planned.exists():
            mine = part.share(stored.cut_pieces(sources, tally, settings.seed, store / "pieces"), pieces)
            total = None if None in sizes else sum(sizes)
            with tqdm(desc="tokenize", total=total, unit="B", unit_scale=True, disable=None) as bar:
                for found in each(stored.make_piece, mine):
                    documents, tokens = documents + found[0], tokens + found[1]
                    rate = tokens / max(bar.format_dict["elapsed"], 1e-9)
                    bar.set_postfix_str(f"{documents:,} documents, {rate:,.0f} tokens/s")
                    bar.update(tally.read - bar.n)
            part.join("pieces", pieces, partial(stored.join, store, pieces, settings, tally, vocabulary.size), planned)
        counts, shards = json.loads(planned.read_text())
        mine = list(part.share(((store / f"{name}.json", *span) for name, span in shards.items()), entries))
        for _ in each(_make_shard, tqdm(mine, desc="rows", unit="shard", disable=None)):
            pass
    part.join("shards", entries, partial(_finish, settings, vocabulary, out, counts, entries), out / "manifest.json")


def _finish(settings, vocabulary: Vocabulary, out: Path, counts: dict, entries: list[Path]) -> None:
    """Write the manifest from what the shards left; its counts are those of the join and, over training rows, these."""
    shards, counted = zip(*(json.loads(entry.read_text()) for entry in entries), strict=True)
    train, held = (tuple(block.Shard(**shard) for shard in shards if shard["name"].startswith(kind)) for kind in stored.DRAWS)
    found = sum(map(Counter, counted), Counter())
    of_one = found["rows"] - found["chunks_of_several"]
    counts |= {
        "truncated_tokens": found["truncated_tokens"],
        "masked": found["masked_tokens"] / settings.mask_sets / found["tokens"],  # share of the tokens
        "random_next": found["random"] / found["rows"],  # share of the rows whose B is random
        "random_of_one": (found["random"] - found["random_of_several"]) / max(1, of_one),  # where the chunk has one sentence
        "random_of_several": found["random_of_several"] / max(1, found["chunks_of_several"]),
        "mean_length": found["tokens"] / found["rows"],
    }
    for path in out.glob("*.part"):  # of killed workers
        path.unlink()
    flags = (vocabulary.special + 2 * vocabulary.begins_word + 4 * vocabulary.may_replace).astype(np.uint8)
    block.write_json(out / "manifest.json", asdict(block.Manifest(
        format=block.FORMAT, tokenizer=vocabulary.stated(), settings=vars(settings), row_length=settings.row_length,
        mask_sets=settings.mask_sets, rows=found["rows"], tokens=found["tokens"], shards=train, held_out=held,
        counts=counts, vocabulary=block.write(out / "vocabulary.npy", block.npy(flags)))))
    shutil.rmtree(out / ".store")


def _is_built(out: Path, settings) -> bool:
    """Whether OUT holds these very shards.  ValueError where it holds others, built or begun."""
    begun, built = out / ".store" / "settings.json", (out / "manifest.json").exists()
    if not built and not begun.exists():
        if any(out.glob("train-*.tar")):
            raise ValueError(f"--out {out}: holds shards without a manifest; remove them, or give another folder")
        return False
    there = block.read_manifest(out).settings if built else json.loads(begun.read_text())
    here = json.loads(json.dumps(vars(settings)))
    if differ := [f"{name}: {there.get(name)} there, {here[name]} here" for name in here if there.get(name) != here[name]]:
        raise ValueError(f"--out {out}: holds shards of other settings ({'; '.join(differ)}); remove "
                         f"{'them' if built else begun.parent}, give those settings, or another folder")
    return built


def build(names: list[str], tokenizer: str, out: Path, *, workers: int, part: str | None = None, on_error: str = "stop",
          **settings) -> block.Manifest:
    """Build shards of sources in `out` -> Manifest.  ValueError, one line, for everything a person can mend."""
    for name, (low, high) in LIMITS.items():
        value = (settings | {"workers": workers})[name]
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be between {low:,} and {high:,}")
    store = out / ".store"
    share, sources = Part.given(part, store), [Source.opened(name, settings["sentences"]) for name in names]
    named = [place for source in sources for place in ([str(file.resolve()) for file, _ in source.files] or [source.name])]
    if len(set(named)) < len(named):  # a copy of a held-out document would be trained on
        raise ValueError(f"source {max(named, key=named.count)}: given more than once; name it once")
    vocabulary = open_tokenizer(tokenizer)
    settings = SimpleNamespace(sources=[source.stated() for source in sources], tokenizer=vocabulary.fingerprint, **settings)
    if _is_built(out, settings):
        shutil.rmtree(store, ignore_errors=True)  # of a build killed after its manifest
        print(f"{out}: already built with these settings; nothing to do")
        return block.read_manifest(out)
    print(*sources, sep="\n")
    store.mkdir(parents=True, exist_ok=True)
    with share.held():
        try:
            if share.leads:
                block.write_json(store / "settings.json", vars(settings))
            _run(settings, vocabulary, sources, share, workers, Tally(on_error == "skip"))
        finally:
            if share.of == 1 and not (store / "joined/plan.json").exists() and not any(store.glob("pieces/*.npz")):
                shutil.rmtree(store, ignore_errors=True)  # nothing to go on with
                if not any(out.iterdir()):
                    out.rmdir()
    return block.read_manifest(out)


def _failed(reason) -> int:
    print("error:", " ".join(str(reason).split()), file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m shards.build", description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda text: sys.exit(_failed(text))  # one line, without the usage
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
    add("--part", metavar="K/N", help="do the K-th of N parts, here or on another machine; ranks of a launcher do so alone")
    add("--masking", choices=("whole-word", "token"), default="whole-word")
    add("--one-segment", action="store_true", help="rows [CLS] A [SEP], without second segments")
    add("--sentences", choices=("auto", "lines", "prose"), default="auto", help="what text files hold")
    add("--dedup", action="store_true", help="drop documents whose normalized text has been seen")
    add("--on-error", choices=("stop", "skip"), default="stop", help="bad records end the build, or are counted and named")
    add("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    settings = vars(parser.parse_args(argv))
    del settings["local_rank"]
    try:
        manifest = build(**settings)
    except Unfinished as what:
        print(what)
        return 0
    except ValueError as error:
        return _failed(error)
    except OSError as error:
        return _failed(f"--out {settings['out']}: {error}; make room or mend it, then the same command goes on")
    except BrokenProcessPool:
        return _failed("a worker was killed (out of memory?); the same command goes on, perhaps with fewer --workers")
    except KeyboardInterrupt:
        return _failed("stopped; the same command goes on")
    print(summary(settings["out"], manifest))
    return 0


if __name__ == "__main__":
    sys.exit(main())
