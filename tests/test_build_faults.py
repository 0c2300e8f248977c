"""Builds that are killed, stopped, starved of disk or left by another process end with the same bytes, or say what is wrong."""

import fcntl
import hashlib
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import psutil
import pytest

from tests.conftest import generated_documents

pytestmark = pytest.mark.faults
SMALL = """
import sys, shards.build, shards.store
shards.store.PIECE_CHARS = 3000
if __name__ == "__main__":
    shards.build.main()
"""


def until(condition, what: str) -> None:
    """Poll; the limit is only there so that a broken build does not hang the suite."""
    limit = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < limit, f"never came: {what}"
        time.sleep(0.002)


def files(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.iterdir()}


def held(lock: Path) -> bool:
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer_folder):
    """A start of the command with pieces of 3,000 characters, and the files of a straight build."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "small.py").write_text(SMALL)
    (folder / "a.txt").write_text("\n\n".join("\n".join(document) for document in generated_documents(300)))

    def start(out, *words, workers=2):
        command = [sys.executable, str(folder / "small.py"), str(folder / "a.txt"), "--tokenizer", str(tokenizer_folder),
                   "--shards=12", f"--workers={workers}", "--out", str(out), *words]
        return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.getcwd()}, text=True,
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


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_process_goes_on_alone_where_the_other_is_killed(small, tmp_path, moment):
    start, expected = small
    gone, left = start(tmp_path, workers=1), start(tmp_path)
    until(lambda: MOMENTS[moment](tmp_path / ".store"), moment)
    gone.kill()
    gone.wait()
    assert left.wait() == 0, left.stderr.read()
    assert files(tmp_path) == expected


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_process_that_comes_late_shares_what_is_left(small, tmp_path, moment):
    start, expected = small
    early = start(tmp_path)
    until(lambda: MOMENTS[moment](tmp_path / ".store"), moment)
    late = start(tmp_path, workers=1)
    assert [early.wait(), late.wait()] == [0, 0], late.stderr.read()
    assert files(tmp_path) == expected


@pytest.mark.parametrize("file, moment", [("settings.json", None), ("11.npz", "first piece"), ("plan.json", "many pieces"),
                                          ("train-00007.json", "joined"), ("manifest.json", "some rows")])
def test_a_process_waits_for_what_another_makes_and_makes_it_where_that_one_dies(small, tmp_path, file, moment):
    start, expected = small
    locks = tmp_path / ".store" / "locks"
    locks.mkdir(parents=True)
    with open(locks / file, "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as one that makes the file
        build = start(tmp_path, workers=1)
        assert list(islice(build.stdout, 2))[1] == f"waits for {file}, which another process makes\n"
        assert moment is None or MOMENTS[moment](tmp_path / ".store")
        assert [path.parent for path in tmp_path.rglob(file)] == [locks]
    assert build.wait() == 0 and files(tmp_path) == expected  # closed: free, and not made
    assert "which another process makes" not in build.stdout.read()


def test_every_process_meets_the_error_of_the_data_and_the_last_leaves_nothing(small, tmp_path):
    start, _ = small
    for build in [start(tmp_path / "out", "--shards=900", workers=1) for _ in range(3)]:
        _, error = build.communicate()
        assert build.returncode == 2 and error.startswith("error: --shards 900: the documents fill at most ")
    assert not (tmp_path / "out").exists()


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


def test_workers_that_outlive_their_parent_let_go(small, tmp_path):
    """Stopped workers stand for workers that have not noticed yet that their parent is gone."""
    start, expected = small
    build = start(tmp_path)
    until(lambda: MOMENTS["first piece"](tmp_path / ".store"), "first piece")
    workers = [child for child in psutil.Process(build.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    pieces = tmp_path / ".store/pieces"

    def caught():
        """All are stopped, and at least one in the middle of a piece, whose lock it keeps."""
        for worker in workers:
            worker.suspend()
        until(lambda: all(worker.status() == psutil.STATUS_STOPPED for worker in workers), "the stop")
        if any(held(lock) and not (pieces / lock.name).exists() for lock in sorted((tmp_path / ".store/locks").glob("*.npz"))):
            return True
        for worker in workers:
            worker.resume()

    until(caught, "a stop in the middle of a piece")
    build.kill()
    build.wait()
    again = start(tmp_path)
    try:
        assert any(line.startswith("waits for ") for line in again.stdout)
    finally:
        for worker in workers:
            worker.resume()
    assert again.wait() == 0
    until(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers), "the workers' end")
    assert files(tmp_path) == expected and not Path(tmp_path / ".store").exists()
