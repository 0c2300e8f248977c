"""THE FORMAT: rows `[CLS] A [SEP] B [SEP]` in blocks, the samples of a WebDataset shard, and the manifest that lists the shards.

Letters: R rows, T tokens of all rows, M mask sets, P masked positions of all sets and rows."""

import hashlib
import io
import json
import os
import re
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from http.client import HTTPException
from pathlib import Path

import numpy as np

FORMAT = 1
BLOCK_ROWS = 512  # one sample; larger blocks read no faster
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # a manifest may only name files beside it
NPY = re.compile(rb"\x93NUMPY\x01\x00..\{'descr': '([<|]u[1248])', 'fortran_order': False, 'shape': \(([0-9, ]*)\), \} *\n", re.S)
BACK_OFF = (0, 1, 2, 4)  # seconds before each try
STALL = 60  # seconds without a byte from a server end a try
COMMAND_SECONDS = 600  # the longest a command may take: it may say nothing while it works


@dataclass(frozen=True)
class Block:
    """Up to BLOCK_ROWS rows as flat arrays, each a member `00000.ids.npy`, ... of the tar.  Ids are uint8, uint16 or uint32."""
    ids: np.ndarray  # T: token ids, unmasked, special tokens included
    lengths: np.ndarray  # R uint16: tokens of each row
    first: np.ndarray  # R uint16: tokens of segment 0 ([CLS] A [SEP]); equal to the length in one-segment rows
    is_random: np.ndarray  # R uint8: 1 where B is from another document (BERT's "not next")
    mask_counts: np.ndarray  # M x R uint16: masked positions of each row in each set
    mask_positions: np.ndarray  # P uint8 or uint16, ascending inside a row; set by set, row by row
    mask_ids: np.ndarray  # P, as ids: what stands at that position in the masked row

    @staticmethod
    def joined(blocks: list["Block"]) -> "Block":
        """One block of all rows; masks stay set by set."""
        parts = {name: [getattr(block, name) for block in blocks] for name in MEMBERS}
        for name in ("mask_positions", "mask_ids"):
            sets = [np.split(getattr(block, name), block.mask_counts.sum(1).cumsum()[:-1].astype(int)) for block in blocks]
            parts[name] = [part for one_set in zip(*sets, strict=True) for part in one_set]
        return Block(**{name: np.concatenate(arrays, axis=-1) for name, arrays in parts.items()})


MEMBERS = tuple(field.name for field in fields(Block))


def chance(*key: int) -> np.random.Generator:
    """A generator of its own for each key, such as (seed, purpose, number)."""
    return np.random.Generator(np.random.PCG64(key))


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


@dataclass(frozen=True)
class Shard:
    """One tar, as the manifest lists it."""
    name: str
    rows: int
    tokens: int
    bytes: int
    sha256: str


def npy(array: np.ndarray) -> bytes:
    whole = io.BytesIO()
    np.save(whole, np.ascontiguousarray(array), allow_pickle=False)
    return whole.getvalue()


def write(path: Path, data: bytes) -> str:
    """Write a file, whole or not at all -> its sha256."""
    with written_whole(path) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def write_json(path: Path, value) -> None:
    write(path, json.dumps(value, indent=1, default=lambda number: number.tolist()).encode())  # numpy's numbers and arrays


def write_shard(path: Path, blocks: Iterable[Block]) -> Shard:
    """Write one tar, whole or not at all; the same blocks give the same bytes."""
    rows, tokens, whole = 0, 0, io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, block in enumerate(blocks):
            for name in MEMBERS:
                data = npy(getattr(block, name))
                member = tarfile.TarInfo(f"{number:05d}.{name}.npy")  # mtime 0, owner 0
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            rows += len(block.lengths)
            tokens += len(block.ids)
    return Shard(path.name, rows, tokens, len(whole.getbuffer()), write(path, whole.getbuffer()))


def address(folder: str | Path, name: str) -> Path | str:
    """A file's path where it is local, else its URL or `pipe:COMMAND`.  ValueError where the folder is of no known kind."""
    scheme, _, rest = str(folder).partition(":")
    if scheme in ("http", "https") and rest:
        return f"{folder.rstrip('/')}/{name}"
    if scheme == "pipe" and "{}" in rest:
        return folder.replace("{}", name)
    if scheme == "pipe" or rest.startswith("//"):
        raise ValueError(f"shards {folder}: give a folder, http(s)://HOST/FOLDER, or such as 'pipe:aws s3 cp s3://bucket/{{}} -'")
    return Path(folder) / name


def fetch(folder: str | Path, name: str, size: int | None = None) -> bytes:
    """All bytes of a file, in four tries where it is not local, `size` of them where that is known.  OSError in one line."""
    where = address(folder, name)
    if isinstance(where, Path):
        return where.read_bytes()
    for seconds in BACK_OFF:
        time.sleep(seconds)
        try:
            if where.startswith("pipe:"):
                data = subprocess.run(where[5:], shell=True, check=True, stdin=subprocess.DEVNULL, capture_output=True,
                                      timeout=COMMAND_SECONDS).stdout
            else:
                with urllib.request.urlopen(where, timeout=STALL) as answer:
                    data = answer.read()  # IncompleteRead where the server promised more
            if size in (None, len(data)):
                return data
            wrong = f"{len(data):,} bytes came, but the manifest says {size:,}"
        except urllib.error.HTTPError as error:
            wrong = f"HTTP status {error.code} {error.reason}"
            if error.code < 500 and error.code != 429:  # not a matter of time
                raise OSError(wrong) from error
        except subprocess.CalledProcessError as error:
            wrong = f"exit code {error.returncode}: {error.stderr.decode(errors='replace').strip().split(chr(10))[-1]}"
        except (OSError, HTTPException, subprocess.TimeoutExpired) as error:
            wrong = str(getattr(error, "reason", error)) or type(error).__name__
    raise OSError(f"{wrong}; {len(BACK_OFF)} tries")


def check_there(folder: str | Path, shard: Shard) -> None:
    """ValueError names a listed shard that should lie in a local folder and is missing or cut there."""
    path = address(folder, shard.name)
    if isinstance(path, Path) and not path.is_file():
        raise ValueError(f"shard {path}: missing, but the manifest lists it; build the shards again or copy it back")
    if isinstance(path, Path) and (size := path.stat().st_size) != shard.bytes:
        raise ValueError(f"shard {path}: {size:,} bytes, but the manifest says {shard.bytes:,}; build or copy it again")


def read_checked(folder: str | Path, name: str, sha256: str, size: int | None = None) -> bytes:
    """A file beside the manifest.  ValueError names it where it cannot be read or its sum is another one."""
    where = f"shard {address(folder, name)}"
    try:
        data = fetch(folder, name, size)
    except OSError as error:
        raise ValueError(f"{where}: cannot be read ({error.strerror or error})") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{where}: its sha256 is not the manifest's (damaged bytes); build or copy it again")
    return data


def read_shard(folder: str | Path, shard: Shard) -> Block:
    """All rows of one shard, its size and sum checked first.  ValueError names the shard and what is wrong with it."""
    check_there(folder, shard)
    data, arrays, at = read_checked(folder, shard.name, shard.sha256, shard.bytes), [], 0
    try:
        while at < len(data) and data[at]:  # headers by hand: tarfile and np.load would take most of a stream's time
            member, size = data[at:at + 100].rstrip(b"\0").decode(), int(data[at + 124:at + 135], 8)
            payload = memoryview(data)[at + 512:at + 512 + size]
            if not (header := NPY.match(payload)):
                raise ValueError(f"{member} is no array of unsigned integers")
            shape = [int(n) for n in header[2].split(b",") if n]
            arrays.append(np.frombuffer(payload, header[1].decode(), offset=header.end()).reshape(shape))
            at += 512 + -(-size // 512) * 512
        whole = Block.joined([Block(*arrays[n:n + len(MEMBERS)]) for n in range(0, len(arrays), len(MEMBERS))])
        if (rows := len(whole.lengths)) != shard.rows:
            raise ValueError(f"holds {rows:,} rows, but the manifest says {shard.rows:,}")
        return whole
    except (TypeError, ValueError) as error:
        raise ValueError(f"shard {address(folder, shard.name)}: not readable as blocks of rows ({error})") from error


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
    vocabulary: str = ""  # sha256 of vocabulary.npy, uint8 a token id: 1 special + 2 begins a word + 4 may replace a masked token


def read_manifest(folder: str | Path) -> Manifest:
    """ValueError says what is missing or wrong and what to run."""
    where = address(folder, "manifest.json")
    make = "make shards with: python -m shards.build TEXT_FILES --tokenizer bert-base-uncased --out DIR"
    try:
        raw = json.loads(fetch(folder, "manifest.json"))
        if raw["format"] != FORMAT:
            raise ValueError(f"format {raw['format']}, this version reads format {FORMAT}")
        raw |= {key: tuple(Shard(**entry) for entry in raw[key]) for key in ("shards", "held_out")}
        if unsafe := [shard.name for shard in raw["shards"] + raw["held_out"] if not SAFE_NAME.fullmatch(shard.name)]:
            raise ValueError(f"a shard is named {unsafe[0]!r}; a manifest may only name files beside it, [A-Za-z0-9._-]+")
        return Manifest(**raw)
    except OSError as error:
        raise ValueError(f"no shards in {folder} ({where}: {error.strerror or error}); {make}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{where}: not a manifest of shards ({error}); {make}") from error
