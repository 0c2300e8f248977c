"""Builds that are killed, stopped, starved of disk or left by another part go on to the same bytes, or say what is wrong."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from shards import parts
from shards.parts import Part
from tests.conftest import generated_documents

pytestmark = pytest.mark.faults
SMALL = """
import sys, shards.store, shards.parts
shards.store.PIECE_CHARS, shards.parts.LOST, shards.parts.BEAT, shards.parts.POLL = 3000, 3, 0.2, 0.05
from shards.build import main
if __name__ == "__main__":
    sys.exit(main())
"""


def until(condition, what: str) -> None:
    """Poll; the limit is only there so that a broken build does not hang the suite."""
    limit = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < limit, f"never came: {what}"
        time.sleep(0.002)


def files(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer_folder):
    """A start of the command with pieces of 3,000 characters, and the files of a straight build."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "small.py").write_text(SMALL)
    (folder / "a.txt").write_text("\n\n".join("\n".join(document) for document in generated_documents(300)))

    def start(out, *words, workers=2, **variables):
        command = [sys.executable, str(folder / "small.py"), str(folder / "a.txt"), "--tokenizer", str(tokenizer_folder),
                   "--shards=12", f"--workers={workers}", "--out", str(out), *words]
        return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.getcwd()} | variables, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)

    assert start(folder / "straight").wait() == 0
    return start, files(folder / "straight")


MOMENTS = {
    "first piece": lambda store: any(store.glob("pieces/*.npz")),
    "many pieces": lambda store: len(list(store.glob("pieces/*.npz"))) > 40,
    "joining": lambda store: (store / "joined").exists(),
    "joined": lambda store: (store / "joined/plan.json").exists(),
    "some rows": lambda store: len(list(store.glob("train-*.json"))) > 4,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_build_started_again_at_once_ends_with_the_same_bytes(small, tmp_path, moment):
    start, expected = small
    build = start(tmp_path / "out")
    until(lambda: MOMENTS[moment](tmp_path / "out" / ".store"), moment)
    workers = psutil.Process(build.pid).children(recursive=True)
    build.send_signal(signal.SIGKILL)  # the parent alone
    build.wait()
    assert not (tmp_path / "out" / "manifest.json").exists()
    again = start(tmp_path / "out")
    assert again.wait() == 0, again.stderr.read()
    assert files(tmp_path / "out") == expected
    until(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers), "the workers' end")


def test_work_that_is_there_is_not_done_again(small, tmp_path):
    start, expected = small
    build = start(tmp_path)
    until(lambda: MOMENTS["some rows"](tmp_path / ".store"), "some rows")
    build.kill()
    build.wait()
    whole = {path.with_suffix(".tar").name for path in (tmp_path / ".store").glob("train-*.json")}
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in whole}
    assert start(tmp_path).wait() == 0 and files(tmp_path) == expected
    assert before == {name: (tmp_path / name).stat().st_mtime_ns for name in whole}


def test_a_build_begun_in_two_parts_may_be_ended_by_one(small, tmp_path):
    start, expected = small
    assert start(tmp_path, "--part=2/2").wait() == 0
    begun = len(list((tmp_path / ".store" / "pieces").iterdir()))
    assert begun > 20
    assert start(tmp_path, workers=1).wait() == 0 and files(tmp_path) == expected


def test_a_build_goes_on_after_ctrl_c(small, tmp_path):
    start, expected = small
    build = start(tmp_path)
    until(lambda: MOMENTS["many pieces"](tmp_path / ".store"), "many pieces")
    os.killpg(build.pid, signal.SIGINT)  # as a terminal does: to the workers too
    build.communicate()
    assert start(tmp_path).wait() == 0 and files(tmp_path) == expected


def test_a_killed_worker_is_said_and_the_build_goes_on(small, tmp_path):
    start, expected = small
    build = start(tmp_path)
    until(lambda: MOMENTS["first piece"](tmp_path / ".store"), "first piece")
    worker = next(child for child in psutil.Process(build.pid).children() if "spawn_main" in " ".join(child.cmdline()))
    worker.kill()
    _, error = build.communicate()
    assert build.returncode == 2 and "a worker was killed" in error and error.count("\n") == 1
    assert start(tmp_path).wait() == 0 and files(tmp_path) == expected


def test_a_full_disk_is_said_and_the_build_goes_on(small, tmp_path):
    start, expected = small
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        build = start(disk / "out")
        _, error = build.communicate()
        assert build.returncode == 2 and error.count("\n") == 1
        assert f"--out {disk}/out: [Errno 28] No space left on device" in error and "the same command goes on" in error
        assert any((disk / "out" / ".store" / "pieces").glob("*.npz"))
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert start(disk / "out").wait() == 0 and files(disk / "out") == expected
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_rank_that_is_gone_ends_the_others(small, tmp_path):
    start, expected = small
    ranks = [start(tmp_path, workers=1, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    until(lambda: (tmp_path / ".store" / "part-2").exists() and MOMENTS["first piece"](tmp_path / ".store"), "first piece")
    ranks[1].kill()
    ranks[1].wait()
    out, error = ranks[0].communicate()
    if ranks[0].returncode:  # the killed rank may have had its pieces and shards ready before
        assert "part 2/2 is gone: no sign of it for 3 s" in error and "waits for" in out
    ranks = [start(tmp_path, workers=1, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    assert [rank.wait() for rank in ranks] == [0, 0] and files(tmp_path) == expected


def test_a_waiting_part_tells_a_failure_from_an_old_one_and_from_silence(tmp_path, monkeypatch, capsys):
    part, other, never = Part(1, 2, True, tmp_path), tmp_path / "part-2", [tmp_path, tmp_path / "never"]
    monkeypatch.setattr(parts, "LOST", 0.3)
    for contents, says in (((b".", b"..", b"..no more tea"), "part 2/2 failed: no more tea"),
                           ((b"..of yesterday", b"", b".", b".of today"), "part 2/2 failed: of today"),
                           ((b"..of yesterday",), "part 2/2 is gone: .*of yesterday"), ((b".", b".."), "is gone: no sign")):
        left = list(contents)
        other.write_bytes(left.pop(0))
        monkeypatch.setattr("time.sleep", lambda _: left and other.write_bytes(left.pop(0)))
        with pytest.raises(ValueError, match=says):
            part.wait("pieces", never)
    assert "part 1/2: waits for pieces of part [2]" in capsys.readouterr().out
    part.wait("pieces", [tmp_path])


def test_a_failing_part_leaves_its_error(tmp_path):
    with pytest.raises(OSError), Part(2, 3, True, tmp_path).held():
        raise OSError("no more tea")
    assert (tmp_path / "part-2").read_bytes() == b"no more tea"
    with Part(2, 3, True, tmp_path).held():
        assert (tmp_path / "part-2").read_bytes() == b""


def test_a_document_of_50_mb_fits_in_a_gigabyte(tmp_path, tokenizer_folder):
    lines = "\n".join(sentence for document in generated_documents(200) for sentence in document)
    with open(tmp_path / "large.txt", "w") as file:
        for _ in range(50 * 2**20 // len(lines) + 1):
            file.write(lines + "\n")
        file.write("\nA small one .\nIt has two lines .\n")
    assert (tmp_path / "large.txt").stat().st_size > 50 * 2**20
    build = subprocess.Popen([sys.executable, "-m", "shards.build", str(tmp_path / "large.txt"), "--tokenizer",
                              str(tokenizer_folder), "--out", str(tmp_path / "out"), "--workers=1", "--mask-sets=1"])
    _, status, usage = os.wait4(build.pid, 0)
    assert status == 0 and usage.ru_maxrss < 2**20  # KiB; most of it is what transformers loads and the text itself


def test_the_lock_is_free_when_only_workers_are_left(small, tmp_path, tokenizer_folder, capsys):
    """Stopped workers stand for workers that have not noticed yet that their parent is gone."""
    start, expected = small
    build = start(tmp_path)
    until(lambda: MOMENTS["first piece"](tmp_path / ".store"), "first piece")
    workers = [child for child in psutil.Process(build.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    for worker in workers:
        worker.suspend()
    build.kill()
    build.wait()
    try:
        assert start(tmp_path).wait() == 0 and files(tmp_path) == expected
    finally:
        for worker in workers:
            worker.resume()
    until(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers), "the workers' end")
    assert files(tmp_path) == expected and not Path(tmp_path / ".store").exists()
