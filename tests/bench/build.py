"""Tokens a second of a whole build against the tokenizer alone, and the memory of the build's processes.

    python tests/bench/build.py SOURCE... --tokenizer DIR [--workers 2] [--rounds 3] [--repeat-to 3e8] [--work DIR]

A round is the command `python -m shards.build` from start to end (reading, sentences, pairs, 3 mask sets, writing), and
encode_batch_fast on the very same sentences in one process with as many threads as there are workers, in batches of 1,000
and of 10,000, whichever is faster.  `--repeat-to BYTES` first writes documents of the sources, one sentence a line, in
seeded random orders, until that size: start-up (seconds, mostly of imports) weighs less the larger it is.  Memory is the sum
of the proportional set sizes (PSS: shared pages count once) of the build and its workers, sampled ten times a second.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from shards.block import read_manifest  # noqa: E402
from shards.corpus import Tally  # noqa: E402
from shards.sources import Source  # noqa: E402
from shards.tokenizer import open_tokenizer  # noqa: E402

CHILD = "encode"  # first word of the command line of the process that only encodes


def sentences(names: list[str]) -> Iterator[str]:
    for name in names:
        for form, units in Source.opened(name).documents(Tally(False)):
            yield from form.sentences(units)


def repeated(names: list[str], path: Path, size: float) -> None:
    """Documents of the sources in random orders, once more and once more, until `path` has `size` bytes."""
    texts = []
    for name in names:
        for form, units in Source.opened(name).documents(Tally(False)):
            lines = form.sentences(units)
            texts += ["\n".join(lines[at:at + 200]) + "\n\n" for at in range(0, len(lines), 200)]
    rng = np.random.Generator(np.random.PCG64(0))
    with open(path, "w") as file:
        while file.tell() < size:
            for number in rng.permutation(len(texts)):
                file.write(texts[number])


def encode(json_path: str, batch: int, names: list[str]) -> None:
    """Print tokens and seconds of encode_batch_fast; RAYON_NUM_THREADS is set.  What it encodes is read outside the clock."""
    from tokenizers import Tokenizer

    tokenizer, source = Tokenizer.from_file(json_path), sentences(names)
    tokens, seconds = 0, 0.0
    while texts := list(islice(source, batch)):
        begin = time.perf_counter()
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        seconds += time.perf_counter() - begin
        tokens += sum(map(len, encoded))
    print(tokens, seconds)


def memory(process: psutil.Process) -> int:
    """Bytes of a process and its descendants; 0 where they are just gone."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
    return total


def build(names: list[str], tokenizer: str, out: Path, workers: int) -> tuple[float, int]:
    """(seconds, peak bytes of memory) of the whole command."""
    shutil.rmtree(out, ignore_errors=True)
    begin, peak = time.perf_counter(), 0
    command = subprocess.Popen([sys.executable, "-m", "shards.build", *names, "--tokenizer", tokenizer, "--out", str(out),
                                "--workers", str(workers)], stdout=subprocess.DEVNULL)
    while command.poll() is None:
        peak = max(peak, memory(psutil.Process(command.pid)))
        time.sleep(0.1)
    if command.returncode:
        sys.exit("the build failed")
    return time.perf_counter() - begin, peak


def main() -> None:
    if sys.argv[1:2] == [CHILD]:
        return encode(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat-to", type=float, metavar="BYTES")
    parser.add_argument("--work", type=Path, help="a folder on a disk with room; without it a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        names, work = options.sources, Path(work)
        if options.repeat_to:
            repeated(names, work / "text.txt", options.repeat_to)
            names = [str(work / "text.txt")]
        (work / "tokenizer.json").write_text(open_tokenizer(options.tokenizer).json)  # truncation and padding are off
        threads = os.environ | {"RAYON_NUM_THREADS": str(options.workers), "TOKENIZERS_PARALLELISM": "true"}
        ratios = []
        for number in range(options.rounds):
            alone = []
            for batch in (1000, 10_000):
                command = [sys.executable, __file__, CHILD, str(work / "tokenizer.json"), str(batch), *names]
                done = subprocess.run(command, env=threads, text=True, check=True, stdout=subprocess.PIPE)
                alone.append(int(done.stdout.split()[0]) / float(done.stdout.split()[1]))
            seconds, peak = build(names, options.tokenizer, work / "out", options.workers)
            manifest = read_manifest(work / "out")
            rate = manifest.counts["tokens"] / seconds
            ratios.append(rate / max(alone))
            print(f"round {number}: build {rate:,.0f} tokens/s in {seconds:.1f} s, encode_batch_fast {alone[0]:,.0f} in batches "
                  f"of 1,000 and {alone[1]:,.0f} of 10,000: {ratios[-1]:.1%}; peak {peak / 2**20:,.0f} MiB (PSS)", flush=True)
        size = sum(shard.bytes for shard in manifest.shards) / manifest.tokens
        print(f"median {statistics.median(ratios):.1%}; {manifest.counts['tokens']:,} tokens of text, {manifest.tokens:,} of "
              f"rows, {size:.2f} bytes each")


if __name__ == "__main__":
    main()
