"""The tokenized corpus on disk, from which rows are drawn: pieces of the text, a file each, joined into flat, mapped files."""

import mmap
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import chain, count, pairwise
from multiprocessing import parent_process
from pathlib import Path
from threading import Thread
from unicodedata import normalize

import numpy as np
from tokenizers import Tokenizer

from shards.block import chance, write, write_json, written_whole
from shards.corpus import Form, Tally
from shards.sources import Source
from shards.tokenizer import Vocabulary

SHARD_BYTES = 16 * 2**20
PIECE_CHARS = 2**20  # of a piece, about: a function of the text alone
BATCH = 1000  # sentences encoded at once: bounds the memory of a long document
HELD_OUT, COPIES = 0, 1  # streams of chance
DRAWS = {"train": (2, 3), "held": (4, 5)}  # of rows and of masks
DOCUMENT = np.dtype([("sentences", "u4"), ("tokens", "u4"), ("copies", "u1"), ("source", "u2"), ("hash", "u8")])


@dataclass(frozen=True)
class Store:
    """All sentences of all documents, flat; D documents, S sentences."""
    ids: np.ndarray  # token ids
    sentences: np.ndarray  # S + 1 int64: sentence s is ids[sentences[s]:sentences[s + 1]]
    documents: np.ndarray  # D + 1 int64: document d is the sentences from documents[d] to documents[d + 1]
    places: np.ndarray  # D + 1 int64: sentences x copies of the documents before d; one that rows are not of has no copies

    @staticmethod
    def opened(folder: Path, kind: str, id_type: np.dtype) -> "Store":
        """For the rows of a kind, `train` or `held`, which is the name of its places."""
        types = {"ids": id_type, "sentences": np.int64, "documents": np.int64, kind: np.int64}
        return Store(*(np.memmap(folder / name, type_, "r").view(np.ndarray) for name, type_ in types.items()))

    def let_go(self) -> None:
        """Give back the memory of the pages that were read; they are read again when they are needed."""
        for array in vars(self).values():
            if isinstance(array.base, np.memmap):
                array.base._mmap.madvise(mmap.MADV_DONTNEED)


WORKER = {}  # what a worker process keeps between tasks: set once, by start_worker


def start_worker(vocabulary: Vocabulary, settings) -> None:
    if parent := parent_process():
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
        Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # no worker outlives a killed parent
    tokenizer = Tokenizer.from_str(vocabulary.json)
    tokenizer.encode_special_tokens = True  # where the text itself says [SEP] it is text; only the unknown token is found
    WORKER.update(tokenizer=tokenizer, vocabulary=vocabulary, settings=settings)


def cut_pieces(sources: list[Source], tally: Tally, seed: int, folder: Path) -> Iterator[tuple[Path, int, list]]:
    """Pieces in order: a file for each, the number of its source, and (form, units, copies) of consecutive documents of it."""
    folder.mkdir(exist_ok=True)
    files = (folder / f"{number}.npz" for number in count())
    for number, source in enumerate(sources):
        drawn, (whole, part) = chance(seed, COPIES, number), divmod(source.weight, 1)
        piece, chars = [], 0
        for form, units in source.documents(tally):
            copies = int(whole) + (part > 0 and drawn.random() < part)
            tally.counts["dropped_thinned"] += not copies
            if copies:
                piece.append((form, units, copies))
                chars += sum(map(len, units))
            if chars >= PIECE_CHARS:
                yield next(files), number, piece
                piece, chars = [], 0
        if piece:
            yield next(files), number, piece


def make_piece(path: Path, source: int, piece: list[tuple[Form, list[str], int]]) -> None:
    """Tokenize one piece into its file.  Documents without a token are left out and counted."""
    unk, split = WORKER["vocabulary"].unk, [form.sentences(units) for form, units, _ in piece]
    sentences = [text.replace("<unk>", unk) if unk else text for text in chain.from_iterable(split)]
    encoded = [each.ids for at in range(0, len(sentences), BATCH)
               for each in WORKER["tokenizer"].encode_batch_fast(sentences[at:at + BATCH], add_special_tokens=False)]
    lengths = np.fromiter(map(len, encoded), np.uint32, len(encoded))
    ids = np.fromiter(chain.from_iterable(encoded), np.min_scalar_type(WORKER["vocabulary"].size - 1), int(lengths.sum()))
    of_document = np.repeat(np.arange(len(split)), [len(sentences) for sentences in split])
    table = np.zeros(len(split), DOCUMENT)
    table["sentences"], table["tokens"] = (np.bincount(of_document, each, len(split)) for each in (lengths > 0, lengths))
    table["copies"], table["source"] = [copies for *_, copies in piece], source
    if WORKER["settings"].dedup:  # 64 bits of a document's text, whatever its case, spacing and compatibility forms
        texts = (" ".join(normalize("NFKC", " ".join(sentences)).casefold().split()) for sentences in split)
        table["hash"] = [int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") for text in texts]
    full = table["sentences"] > 0
    unknown = np.count_nonzero(ids == WORKER["tokenizer"].token_to_id(unk)) if unk else 0
    with written_whole(path) as file:
        np.savez(file, ids=ids, lengths=lengths[lengths > 0], documents=table[full], counts=[np.count_nonzero(~full), unknown])


def held_out_documents(there: np.ndarray, share: float, seed: int) -> np.ndarray:
    """bool D: drawn from (seed, document) among those that are `there`; one at least, but none of less than three."""
    if not share or np.count_nonzero(there) < 3:
        return np.zeros(len(there), bool)
    drawn = np.where(there, chance(seed, HELD_OUT, 0).random(len(there)), 1.0)
    return drawn < max(share, np.nextafter(drawn.min(), 1))


def _ranges(tokens: np.ndarray, shards: int) -> list[tuple[int, int]]:
    """Contiguous ranges of documents of about equal tokens; fewer where documents are larger than a share."""
    ends = np.cumsum(tokens)
    last = np.searchsorted(ends, [max(1, int(ends[-1]) * n // shards) for n in range(1, shards + 1)])
    return list(pairwise(np.unique([0, *(last + 1)]).tolist()))


class NoPlan(ValueError):
    """The pieces are of no use: other settings, or other text, are another build."""


def plan(settings, train: np.ndarray, held: np.ndarray, id_bytes: int) -> dict[str, tuple[int, int]]:
    """The range of documents of each shard, `train-00000` and on, from the tokens x copies of each document."""
    if (there := np.count_nonzero(train)) < 2 - settings.one_segment:
        raise NoPlan(f"documents to train on: {there}, but random second segments need two at least; give more text"
                     + ", or --one-segment for rows without a second segment" * there)
    # A token makes 1.25 of rows (special ones and random second segments, less what is cut), 0.15 of each mask set.
    estimate = 1.25 * train.sum() * (id_bytes + 0.15 * settings.mask_sets * (id_bytes + 1))
    ranges = {"train": _ranges(train, settings.shards or max(1, round(estimate / SHARD_BYTES)))}
    if (most := len(ranges["train"])) < (settings.shards or 0):
        raise NoPlan(f"--shards {settings.shards}: the documents fill at most {most}, whole in each; give that or less")
    if held.any():
        ranges["held"] = _ranges(held, max(1, round(most * held.sum() / train.sum())))
    return {f"{kind}-{number:05d}": span for kind, spans in ranges.items() for number, span in enumerate(spans)}


def join(settings, tally: Tally, vocab_size: int, planned: Path, pieces: list[Path]) -> None:
    """Lay all pieces end to end beside plan.json, written last: what was counted, what is to be made."""
    counts, tables, folder, end = Counter(tally.counts), [np.zeros(0, DOCUMENT)], planned.parent, 0
    folder.mkdir(exist_ok=True)
    with written_whole(folder / "ids") as ids, written_whole(folder / "sentences") as sentences:
        sentences.write(np.zeros(1, np.int64))
        for path in pieces:
            with np.load(path) as piece:
                tables.append(piece["documents"])
                counts.update(dict(zip(("dropped_empty", "unknown_tokens"), piece["counts"].tolist(), strict=True)))
                ids.write(piece["ids"])
                sentences.write(end + np.cumsum(piece["lengths"], dtype=np.int64))
                end += len(piece["ids"])
    table = np.concatenate(tables)  # in all some 60 bytes of memory a document
    if settings.dedup:
        again = np.delete(np.arange(len(table)), np.unique(table["hash"], return_index=True)[1])  # the first of each stays
        table["copies"][again] = 0  # a duplicate has none
        counts["dropped_duplicate"] = len(again)
    kept = table["copies"] > 0
    held = held_out_documents(kept, settings.held_out, settings.seed)
    copies = table["copies"] * ~held
    sizes, tokens = (table[name].astype(np.int64) for name in ("sentences", "tokens"))
    for name, counted in {"documents": sizes, "train": sizes * copies, "held": sizes * held}.items():
        write(folder / name, np.append(0, np.cumsum(counted)).tobytes())
    tasks = plan(settings, tokens * copies, tokens * held, np.min_scalar_type(vocab_size - 1).itemsize)
    of_source = np.bincount(table["source"], tokens * copies, len(settings.sources))
    counts.update(documents=kept.sum(), held_out_documents=held.sum(), sentences=sizes[kept].sum(), tokens=tokens[kept].sum())
    shares = [{"name": source["name"], "weight": source["weight"], "share": share}  # of the tokens that rows are drawn from
              for source, share in zip(settings.sources, of_source / of_source.sum(), strict=True)]
    write_json(planned, [dict(counts, bad=tally.bad, sources=shares), tasks])
    shutil.rmtree(pieces[0].parent)
