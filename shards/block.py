"""THE FORMAT: blocks of rows, the samples of a WebDataset shard, and the manifest that lists the shards.

A row is one NSP pair `[CLS] A [SEP] B [SEP]`, kept unmasked.  A block is up to BLOCK_ROWS rows; it is one
WebDataset sample, so a shard is a plain tar of members `00000.ids.npy`, `00000.lengths.npy`, ...  Ragged
arrays are stored flat beside their lengths.  Letters: R rows, T tokens of all rows, M mask sets, P masked
positions of all sets and rows.
"""

import hashlib
import io
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

FORMAT = 1
BLOCK_ROWS = 512  # one sample; larger blocks read no faster
SAFE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")  # a manifest may only name files beside it


@dataclass(frozen=True)
class Block:
    """Rows as flat arrays.  Ids are uint16 where the vocabulary allows, uint32 elsewhere."""

    ids: np.ndarray  # T: token ids, unmasked, special tokens included
    lengths: np.ndarray  # R uint16: tokens of each row
    first: np.ndarray  # R uint16: tokens of segment 0 ([CLS] A [SEP]); equal to the length in one-segment rows
    is_random: np.ndarray  # R uint8: 1 where B is from another document (BERT's "not next")
    mask_counts: np.ndarray  # M x R uint16: masked positions of each row in each set
    mask_positions: np.ndarray  # P uint8 or uint16, ascending inside a row; set by set, row by row
    mask_ids: np.ndarray  # P, as ids: what stands at that position in the masked row

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @staticmethod
    def joined(blocks: list["Block"]) -> "Block":
        """One block of all rows; masks stay set by set."""
        sets = [np.split(b.mask_positions, np.cumsum(b.mask_counts.sum(1))[:-1]) for b in blocks]
        kept = [np.split(b.mask_ids, np.cumsum(b.mask_counts.sum(1))[:-1]) for b in blocks]
        flat = {name: np.concatenate([getattr(b, name) for b in blocks])
                for name in ("ids", "lengths", "first", "is_random")}
        return Block(
            **flat,
            mask_counts=np.concatenate([b.mask_counts for b in blocks], axis=1),
            mask_positions=np.concatenate([part for s in zip(*sets, strict=True) for part in s]),
            mask_ids=np.concatenate([part for s in zip(*kept, strict=True) for part in s]),
        )


MEMBERS = tuple(field.name for field in fields(Block))


def id_type(vocab_size: int) -> type:
    """The narrowest integer that holds every id below `vocab_size`."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def position_type(row_length: int) -> type:
    return np.uint8 if row_length <= 256 else np.uint16


@contextmanager
def written_whole(path: Path) -> Iterator[io.BufferedWriter]:
    """Open `path` for writing so that it appears complete, on the disk, or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


class _Hashed:
    """A file to write to that sums what passes."""

    def __init__(self, file: io.BufferedWriter):
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)


@dataclass(frozen=True)
class Shard:
    """One tar, as the manifest lists it."""

    name: str
    rows: int
    tokens: int
    bytes: int
    sha256: str


def write_shard(path: Path, blocks: Iterable[Block]) -> Shard:
    """Write one tar, whole or not at all; the same blocks give the same bytes."""
    rows = tokens = 0
    with written_whole(path) as raw:
        hashed = _Hashed(raw)
        with tarfile.open(fileobj=hashed, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
            for number, block in enumerate(blocks):
                for name in MEMBERS:
                    payload = io.BytesIO()
                    np.save(payload, np.ascontiguousarray(getattr(block, name)), allow_pickle=False)
                    member = tarfile.TarInfo(f"{number:05d}.{name}.npy")  # mtime 0, owner 0
                    member.size = payload.tell()
                    payload.seek(0)
                    tar.addfile(member, payload)
                rows += block.rows
                tokens += len(block.ids)
    return Shard(path.name, rows, tokens, hashed.bytes, hashed.sha256.hexdigest())


def read_blocks(data: bytes, name: str) -> Iterator[Block]:
    """The blocks of one tar held in memory.  ValueError names the shard and what is wrong with it."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            arrays: dict[str, np.ndarray] = {}
            for member in tar:
                field = member.name.split(".")[1]
                arrays[field] = np.load(io.BytesIO(tar.extractfile(member).read()), allow_pickle=False)
                if field == MEMBERS[-1]:
                    yield Block(**arrays)
                    arrays = {}
    except (tarfile.TarError, EOFError, OSError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise ValueError(f"shard {name}: not readable as blocks of rows ({error})") from error


def shard_path(folder: Path, shard: Shard) -> Path:
    """Where a listed shard lies, in its full length.  ValueError names it where it is missing or cut."""
    path = folder / shard.name
    size = path.stat().st_size if path.is_file() else None
    if size is None:
        raise ValueError(f"shard {path}: missing, but the manifest lists it; build the shards again or copy it back")
    if size != shard.bytes:
        raise ValueError(f"shard {path}: {size:,} bytes, but the manifest says {shard.bytes:,} "
                         "(cut short or overwritten); build or copy it again")
    return path


def read_shard(folder: Path, shard: Shard) -> Block:
    """All rows of one shard, its sum checked first.  ValueError names the shard."""
    path = shard_path(folder, shard)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"shard {path}: cannot be read ({error.strerror})") from error
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        raise ValueError(f"shard {path}: its sha256 is not the manifest's (damaged bytes); build or copy it again")
    block = Block.joined(list(read_blocks(data, str(path))))
    if block.rows != shard.rows:
        raise ValueError(f"shard {path}: holds {block.rows:,} rows, but the manifest says {shard.rows:,}")
    return block


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a build states about its shards; `manifest.json`, written last."""

    format: int
    tokenizer: dict  # fingerprint, name, vocab_size, and the ids of pad, cls, sep, mask
    settings: dict  # every setting of the build, sources included
    row_length: int
    mask_sets: int
    rows: int  # training rows
    tokens: int
    shards: tuple[Shard, ...]
    held_out: tuple[Shard, ...]  # rows of documents never trained on
    counts: dict  # what came out: documents, rates, lengths


def write_manifest(folder: Path, manifest: Manifest) -> None:
    with written_whole(folder / "manifest.json") as file:
        file.write(json.dumps(asdict(manifest), indent=1).encode())


def read_manifest(folder: Path) -> Manifest:
    """ValueError says what is missing or wrong and what to run."""
    path = Path(folder) / "manifest.json"
    make = f"make shards with: python -m shards.build python-docs --tokenizer bert-base-uncased --out {folder}"
    if not path.exists():
        raise ValueError(f"no shards in {folder} ({path} is not there); {make}")
    try:
        raw = json.loads(path.read_text())
        if raw["format"] != FORMAT:
            raise ValueError(f"{path}: format {raw['format']}, this version reads format {FORMAT}; {make}")
        for key in ("shards", "held_out"):
            raw[key] = tuple(Shard(**entry) for entry in raw[key])
        manifest = Manifest(**raw)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a manifest of shards ({error}); {make}") from error
    for shard in manifest.shards + manifest.held_out:
        if not SAFE_NAME.fullmatch(shard.name):
            raise ValueError(f"{path}: a shard is named {shard.name!r}; a manifest may only name files beside it, "
                             "in letters, digits, '.', '_' and '-'")
    return manifest
