"""Shards from a local folder, a server or a command: what comes, what is tried again, what is said; and dynamic masks."""

import dataclasses
import io
import json
import shutil
import tarfile
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from runs import SMALL, launch, learned, metrics
from test_stream import rows_at

from shards import block
from shards.block import read_manifest, read_shard
from shards.stream import DynamicMasks, Stream, splitmix64


class Server(ThreadingHTTPServer):
    """Serves a folder on loopback.  `answers` says what the next requests for a name get instead of the file."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.answers, self.asked = folder, {}, []
        self.go = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        name, server = self.path.removeprefix("/"), self.server
        server.asked.append(name)
        kind = next(server.answers.get(name, iter(())), "good")
        data = (server.folder / name).read_bytes() if kind in ("good", "cut", "short", "silent") else b""
        self.send_response(200 if data else kind)
        if kind != "short":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if kind == "silent":
            self.wfile.write(data[:100])
            server.go.wait(60)
        self.wfile.write(data[:len(data) // 2] if kind in ("cut", "short") else data)


@pytest.fixture
def server(shards_folder):
    with Server(shards_folder) as made:
        thread = threading.Thread(target=made.serve_forever, daemon=True)
        thread.start()
        yield made
        made.go.set()
        made.shutdown()
        thread.join()


@pytest.fixture
def waits(monkeypatch):
    """The seconds of back-off, not waited."""
    seconds = []
    monkeypatch.setattr(block, "time", SimpleNamespace(sleep=seconds.append))
    return seconds


@pytest.fixture
def shard(shards_folder):
    return read_manifest(shards_folder).shards[1]


def same(one: block.Block, other: block.Block) -> bool:
    return all((getattr(one, name) == getattr(other, name)).all() for name in block.MEMBERS)


@pytest.mark.parametrize("failures", [(), (503,), (500, 429), ("cut", "short", 502), ("silent",)])
def test_what_a_server_gives_is_what_the_folder_holds(server, shards_folder, shard, waits, monkeypatch, failures):
    """After failures that pass: 5xx, too many requests, a body that ends too early with and without its length, a stall."""
    monkeypatch.setattr(block, "STALL", 0.5)
    server.answers[shard.name] = iter(failures)
    assert read_manifest(server.address) == read_manifest(shards_folder)
    waits.clear()
    assert same(read_shard(server.address, shard), read_shard(shards_folder, shard))
    assert waits == [0, 1, 2, 4][:len(failures) + 1] and server.asked.count(shard.name) == len(failures) + 1


@pytest.mark.parametrize("answers, says, tries", [
    ([500] * 4, "HTTP status 500 Internal Server Error; 4 tries", 4),
    ([404], "HTTP status 404 Not Found", 1),
    ([403], "HTTP status 403 Forbidden", 1),
    (["cut"] * 4, r"IncompleteRead\(.*\); 4 tries", 4),
    (["short"] * 4, "[0-9,]+ bytes came, but the manifest says [0-9,]+; 4 tries", 4),
    (["silent"] * 4, "timed out; 4 tries", 4),
])
def test_a_server_that_fails_is_named_with_shard_and_status(server, shard, waits, monkeypatch, answers, says, tries):
    monkeypatch.setattr(block, "STALL", 0.2)
    server.answers[shard.name] = iter(answers)
    with pytest.raises(ValueError, match=rf"^shard {server.address}{shard.name}: cannot be read \({says}\)$"):
        read_shard(server.address, shard)
    assert server.asked == [shard.name] * tries


def test_a_server_that_is_not_there(waits):
    with Server(Path()) as gone:
        pass
    with pytest.raises(ValueError, match=r"^no shards in http.*manifest.json: .*Connection refused; 4 tries"):
        read_manifest(gone.address)
    assert waits == [0, 1, 2, 4]


def test_a_command_gives_what_the_folder_holds(shards_folder, shard, waits, tmp_path):
    assert read_manifest(f"pipe:cat {shards_folder}/{{}}") == read_manifest(shards_folder)
    once = f"pipe:test -e {tmp_path}/once && cat {shards_folder}/{{}} | cat || ! touch {tmp_path}/once"
    assert same(read_shard(once, shard), read_shard(shards_folder, shard))
    assert waits == [0, 0, 1]


@pytest.mark.parametrize("command, says", [
    ("echo words >&2; echo {} lies elsewhere >&2; exit 3", "exit code 3: train-00001.tar lies elsewhere; 4 tries"),
    ("head -c 1000 FOLDER/{}", "1,000 bytes came, but the manifest says [0-9,]+; 4 tries"),
    ("sleep 60 # {}", "Command .* timed out after 0.2 seconds; 4 tries"),
])
def test_a_command_that_fails_says_its_last_line(shards_folder, shard, waits, monkeypatch, command, says):
    monkeypatch.setattr(block, "COMMAND_SECONDS", 0.2 if "sleep" in command else 60)
    with pytest.raises(ValueError, match=rf"^shard pipe:.*train-00001.tar.*: cannot be read \({says}\)$"):
        read_shard("pipe:" + command.replace("FOLDER", str(shards_folder)), shard)
    assert waits == [0, 1, 2, 4]


@pytest.mark.parametrize("folder", ["pipe:aws s3 cp s3://bucket/wiki -", "s3://bucket/wiki", "gs://bucket"])
def test_a_folder_of_no_known_kind_is_refused(folder):
    with pytest.raises(ValueError, match=rf"shards {folder}: give a folder, http.* such as 'pipe:aws s3 cp"):
        read_manifest(folder)


@pytest.mark.parametrize("name", ["../x.tar", "/etc/x.tar", "pipe:cat x", "http://h/x.tar", "a;b.tar", "-rf", "", ".", "x\n"])
def test_a_manifest_names_only_files_beside_it(tmp_path, shards_folder, name):
    raw = json.loads((shards_folder / "manifest.json").read_text())
    raw["shards"][0]["name"] = name
    (tmp_path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="a manifest may only name files beside it"):
        read_manifest(tmp_path)


def cut_members(data: bytes, kept: int) -> bytes:
    """A tar of the first members alone, as a write that broke off between two of them leaves it."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return data[:tar.getmembers()[kept].offset]


def with_objects(data: bytes) -> bytes:
    """The same tar with an array of Python objects, which only pickle could read."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        payload = io.BytesIO()
        np.save(payload, np.array([print, 1], object), allow_pickle=True)
        member = tarfile.TarInfo("00000.ids.npy")
        member.size = payload.tell()
        tar.addfile(member, io.BytesIO(payload.getvalue()))
    return whole.getvalue()


@pytest.mark.faults
@pytest.mark.parametrize("change, says, says_of_a_whole_file", [
    (lambda d: cut_members(d, 7), "bytes, but the manifest says", "holds [0-9,]+ rows, but the manifest says"),
    (lambda d: cut_members(d, 3), "bytes, but the manifest says", "not readable as blocks of rows"),
    (lambda d: d[:len(d) // 2], "bytes, but the manifest says", "not readable as blocks of rows|holds [0-9,]+ rows"),
    (lambda d: d[:9999] + bytes([d[9999] ^ 1]) + d[10_000:], "its sha256 is not the manifest's", None),
    (with_objects, "bytes, but the manifest says", r"\(00000.ids.npy is no array of unsigned integers\)"),
    (lambda d: b"x" * len(d), "its sha256 is not the manifest's", "not readable as blocks of rows"),
])
def test_a_damaged_shard_is_named_before_a_row_of_it_is_used(tmp_path, change, says, says_of_a_whole_file):
    """As it is, and where the manifest was made to agree with its bytes."""
    shard = two_blocks(tmp_path)
    path = tmp_path / shard.name
    path.write_bytes(change(path.read_bytes()))
    agreeing = dataclasses.replace(shard, bytes=path.stat().st_size, sha256=block.hashlib.sha256(path.read_bytes()).hexdigest())
    for entry, text in ((shard, says), (agreeing, says_of_a_whole_file)):
        if text:
            with pytest.raises(ValueError, match=rf"^shard {path}: .*({text})"):
                read_shard(tmp_path, entry)


def two_blocks(folder: Path) -> block.Shard:
    rng = np.random.Generator(np.random.PCG64(0))
    blocks = []
    for _ in range(2):
        lengths = rng.integers(5, 30, 200).astype(np.uint16)
        counts = np.ones((2, 200), np.uint16)
        blocks.append(block.Block(rng.integers(0, 600, lengths.sum()).astype(np.uint16), lengths, lengths // 2,
                                  np.zeros(200, np.uint8), counts, np.ones(400, np.uint8), np.full(400, 4, np.uint16)))
    shard = block.write_shard(folder / "train-00000.tar", blocks)
    assert same(read_shard(folder, shard), block.Block.joined(blocks))
    return shard


def shown(folder: Path, *, seed: int = 0, passes: int = 2, world: int = 1, start: int = 0) -> dict[tuple, list]:
    """(pass, number) of every row of a run with dynamic masks -> its ids; batches differ with `world` and `start`."""
    manifest = read_manifest(folder)
    masks, found = DynamicMasks(folder, manifest, seed), {}
    for rank in range(world):
        one = Stream(manifest, partial(read_shard, folder), seed=seed, batch=8, lanes=4, rank=rank, world=world, mask=masks)
        for j in range(start, passes * manifest.rows // 8 * 8, 8):
            passes_of = {int(one.first_row[s]) + r: e for e, s, r in rows_at(one, j)}
            for micro in one.batches(j, 4 // world):
                found |= {(passes_of[n], n): ids[real].tolist() for n, ids, real in
                          zip(micro.numbers.tolist(), micro.ids, micro.real, strict=True)}
    return found


@pytest.fixture(scope="module")
def dynamic(shards_folder):
    return shown(shards_folder)


def test_a_rows_dynamic_masks_depend_on_seed_pass_and_row_alone(shards_folder, dynamic):
    manifest = read_manifest(shards_folder)
    assert shown(shards_folder, world=2) == dynamic
    later = shown(shards_folder, start=manifest.rows // 8 * 8 + 16)
    assert later and {key: dynamic[key] for key in later} == later
    other, again = shown(shards_folder, seed=1), shown(shards_folder, passes=3)
    assert sum(dynamic[key] == other[key] for key in dynamic.keys() & other.keys()) < 0.1 * len(dynamic)
    first, third = ([ids for (e, _), ids in sorted(again.items()) if e == which] for which in (0, 2))
    assert sum(a == b for a, b in zip(first, third)) < 0.1 * len(first)


def test_dynamic_masks_are_the_same_in_any_company(shards_folder):
    """More rows than are masked at once, against a few at a time."""
    manifest = read_manifest(shards_folder)
    whole = read_shard(shards_folder, manifest.shards[0])
    masks, rows = DynamicMasks(shards_folder, manifest, 0), np.arange(1200) % len(whole.lengths)
    lengths = whole.lengths.astype(int)[rows]
    ids, begins = np.zeros((len(rows), 48), whole.ids.dtype), np.cumsum(whole.lengths, dtype=int) - whole.lengths
    for at, row in enumerate(rows):
        ids[at, :lengths[at]] = whole.ids[begins[row]:][:lengths[at]]
    together, apart, passes, numbers = ids.copy(), ids.copy(), np.arange(1200) % 3, np.arange(1200)
    masks.apply(together, lengths, passes, numbers, true := np.zeros_like(ids))
    for start in range(0, 1200, 7):
        part = slice(start, start + 7)
        masks.apply(apart[part], lengths[part], passes[part], numbers[part], apart[part])
    assert (together == apart).all() and (np.where(true, true, together) == ids).all() and (together != ids).any(1).mean() > 0.9


def test_dynamic_masks_keep_the_builds_rules(shards_folder, dynamic):
    """At most the budget of a row, never a special token, about 80 % [MASK]; within 4 standard deviations."""
    manifest = read_manifest(shards_folder)
    whole = block.Block.joined([read_shard(shards_folder, shard) for shard in manifest.shards])
    rows = np.split(whole.ids.astype(int), np.cumsum(whole.lengths.astype(int))[:-1])
    changed = masks = 0
    for (_, number), ids in dynamic.items():
        true, ids = rows[number], np.array(ids)
        where = np.flatnonzero(true != ids)
        assert len(where) <= min(max(1, np.rint(0.15 * len(true))), round(0.16 * manifest.row_length))
        assert (true[where] > 4).all() and ((ids[where] == 4) | (ids[where] > 14)).all()  # conftest's [MASK], and no [unused]
        changed, masks = changed + len(where), masks + int((ids[where] == 4).sum())
    share = 8 / 9  # of what differs from the row
    assert abs(masks - share * changed) < 4 * np.sqrt(changed * share * (1 - share))
    assert changed > 0.08 * sum(len(rows[number]) for _, number in dynamic)


def test_splitmix64_gives_the_published_sequence():
    """The first outputs for the seed 1234567, as in the reference implementation's test."""
    states = np.uint64(1234567) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert splitmix64(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_dynamic_masks_need_the_vocabulary(shards_folder, tmp_path):
    manifest = read_manifest(shards_folder)
    with pytest.raises(ValueError, match="mask=dynamic, but .* has no vocabulary.npy; build the shards again, or write mask="):
        DynamicMasks(shards_folder, dataclasses.replace(manifest, vocabulary=""), 0)
    shutil.copytree(shards_folder, tmp_path / "copy")
    (tmp_path / "copy" / "vocabulary.npy").write_bytes(b"other")
    with pytest.raises(ValueError, match="vocabulary.npy: its sha256 is not the manifest's"):
        DynamicMasks(tmp_path / "copy", manifest, 0)


def test_a_run_from_a_command_with_dynamic_masks(inputs, server, tmp_path):
    """The literal command line, its spaces and braces unharmed; the same losses from a server."""
    for number, folder in enumerate([f"pipe:cat {inputs[1]}/{{}} | cat", server.address]):
        launch("--shards", folder, *inputs[2:], "--student", SMALL, "--out", tmp_path / str(number), "mask=dynamic", "steps=3",
               "batch=16", "log_every=1", "deterministic=true", form="bash" if number == 0 else "python")
    one, other = ({step: learned(line) for step, line in metrics(tmp_path / name).items()} for name in "01")
    assert one == other and sorted(one) == [0, 1, 2, 3]
