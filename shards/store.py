"""The tokenized corpus on disk: flat files that a build writes once, in parallel, and draws its rows from."""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from shards.block import id_type
from shards.corpus import Document, Source
from shards.tokenizer import Vocabulary

BATCH_CHARS = 2**18  # text sent to a worker at once


@dataclass(frozen=True)
class Store:
    """All sentences of a corpus, flat; the arrays may be memory maps."""

    ids: np.ndarray  # token ids
    sentences: np.ndarray  # int64: sentence s is ids[sentences[s]:sentences[s + 1]]
    documents: np.ndarray  # int64: document d is the sentences from documents[d] to documents[d + 1]

    @staticmethod
    def opened(folder: Path, id_type: type) -> "Store":
        return Store(*(np.memmap(folder / name, kind, "r").view(np.ndarray)
                       for name, kind in (("ids", id_type), ("sentences", np.int64), ("documents", np.int64))))


WORKER = {}  # what a worker process keeps between tasks: set once, by start_worker


def start_worker(vocabulary: Vocabulary, settings, store: Path) -> None:
    if parent := parent_process():
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # no worker outlives a killed parent
    tokenizer, plain = Tokenizer.from_str(vocabulary.json), Tokenizer.from_str(vocabulary.json)
    plain.encode_special_tokens = True
    WORKER.update(tokenizer=tokenizer, plain=plain, vocabulary=vocabulary, settings=settings, store=store)


def _tokenize(batch: list[Document]) -> tuple:
    """Documents -> (ids, tokens of each sentence, sentences of each document, counts); empty documents left out."""
    vocabulary, unk = WORKER["vocabulary"], WORKER["vocabulary"].unk
    documents = [document.sentences() for document in batch]
    sentences = list(chain.from_iterable(documents))
    if unk:
        sentences = [sentence.replace("<unk>", unk) for sentence in sentences]
    encoded = [e.ids for e in WORKER["tokenizer"].encode_batch_fast(sentences, add_special_tokens=False)]
    roles = {vocabulary.pad, vocabulary.cls, vocabulary.sep, vocabulary.mask}
    for number, ids in enumerate(encoded):
        if not roles.isdisjoint(ids):  # the text itself says [SEP] or [MASK]: it is text, not structure
            encoded[number] = WORKER["plain"].encode(sentences[number], add_special_tokens=False).ids
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    of_document = np.repeat(np.arange(len(documents)), list(map(len, documents)))
    sizes = np.bincount(of_document[lengths > 0], minlength=len(documents))
    ids = np.fromiter(chain.from_iterable(encoded), id_type(vocabulary.size), lengths.sum())
    counts = Counter(dropped_empty=int((sizes == 0).sum()), unknown_tokens=0)
    if unk is not None:
        counts["unknown_tokens"] = int((ids == WORKER["tokenizer"].token_to_id(unk)).sum())
    return ids, lengths[lengths > 0], sizes[sizes > 0], counts


def _batches(documents: Iterable, size: int = BATCH_CHARS) -> Iterator[list]:
    batch, chars = [], 0
    for document in documents:
        batch.append(document)
        chars += sum(map(len, document.units))
        if chars >= size:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def in_order(pool, function: Callable, tasks: Iterable, ahead: int) -> Iterator[tuple]:
    """(task, result) in the order of the tasks, at most `ahead` of them under way; without a pool in this process."""
    waiting = deque()
    for task in tasks:
        if pool is None:
            yield task, function(task)
            continue
        waiting.append((task, pool.submit(function, task)))
        if len(waiting) >= ahead:
            task, future = waiting.popleft()
            yield task, future.result()
    while waiting:
        task, future = waiting.popleft()
        yield task, future.result()


def write_store(folder: Path, sources: list[Source], pool, workers: int) -> Counter:
    """Tokenize every document into flat files: ids, sentence offsets and document offsets (int64, from 0)."""
    counts = Counter()
    total = sum(source.bytes for source in sources) if all(source.files for source in sources) else None
    bar = tqdm(desc="tokenize", total=total, unit="B", unit_scale=True, disable=None)
    documents = (document for source in sources for document in source.documents(counts))
    with bar, open(folder / "ids", "wb") as ids, open(folder / "sentences", "wb") as ends, \
            open(folder / "documents", "wb") as starts:
        np.zeros(1, np.int64).tofile(ends)
        np.zeros(1, np.int64).tofile(starts)
        for batch, (tokens, lengths, sizes, found) in in_order(pool, _tokenize, _batches(documents), 4 * workers):
            tokens.tofile(ids)
            (counts["tokens"] + np.cumsum(lengths)).tofile(ends)
            (counts["sentences"] + np.cumsum(sizes)).tofile(starts)
            counts.update(found)
            counts.update(tokens=len(tokens), sentences=len(lengths), documents=len(sizes))
            bar.update(sum(len(unit) for document in batch for unit in document.units))
            rate = counts["tokens"] / max(bar.format_dict["elapsed"], 1e-9)
            bar.set_postfix_str(f"{counts['documents']:,} documents, {rate:,.0f} tokens/s")
    return counts
