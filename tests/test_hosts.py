"""Several hosts, for real: each with an address, a name, clocks and an sshd of its own, and the launchers that users have."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hosts import PATH, into
from runs import ROOT, SETTINGS, SMALL, assert_same_run, launch, logged, metrics, processes, start, until

pytestmark = pytest.mark.hosts
LONG = [*SETTINGS, "steps=80", "save_every=10", "eval_every=40", "--timeout", "30"]
VARIABLES = {"DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "eth0"}
KEEP_ALIVE = "-o ServerAliveInterval=3 -o ServerAliveCountMax=3"


@pytest.fixture(scope="module")
def hostfile(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hostfile") / "hosts"
    path.write_text((ROOT / "launch/hostfile").read_text().replace("node", "h").replace("slots=8", "slots=1"))
    return path


def by_pdsh(hosts, hostfile: Path, port: int, *given, log: Path, shell: bool = False) -> list[subprocess.Popen]:
    """`deepspeed`, or bash, on h1 alone; what ranks need in their environment stands in a file."""
    launcher = ["--hostfile", str(hostfile), "--master_port", str(port)]
    command, variables = ["deepspeed", *launcher], {"DS_ENV_FILE": "launch/deepspeed_env", "PDSH_SSH_ARGS_APPEND": KEEP_ALIVE}
    if shell:
        command, variables = ["bash"], {**variables, "DS_ARGS": " ".join(launcher)}
    return [hosts[0].start(*command, *given, log=log, **variables)]


def by_no_ssh(hosts, hostfile: Path, port: int, *given, log: Path) -> list[subprocess.Popen]:
    """`deepspeed` on each host."""
    return [host.start("deepspeed", "--no_ssh", "--node_rank", n, "--hostfile", hostfile, "--master_addr", "10.77.0.1",
                       "--master_port", port, *given, log=log, **VARIABLES) for n, host in enumerate(hosts)]


def by_torchrun(hosts, hostfile: Path, port: int, *given, log: Path) -> list[subprocess.Popen]:
    return [host.start("torchrun", "--nnodes", len(hosts), "--nproc-per-node", 1, "--node-rank", n, "--master-addr", "h1",
                       "--master-port", port, *given, log=log, **VARIABLES) for n, host in enumerate(hosts)]


def test_each_launcher_gives_the_losses_of_one_host(hosts, hostfile, inputs, tmp_path):
    """And where --out is not one folder for both hosts, all ranks say so before anything is trained.

    All at once, since starting takes longest; the hosts' clocks are two days apart, as their logs show."""
    given = ["launch/general.sh", *inputs, "--student", SMALL, *SETTINGS, "--out"]
    apart = tmp_path / "apart"
    apart.mkdir()
    subprocess.run([*into(hosts[1].pid), "mount", "-t", "tmpfs", "tmpfs", apart], check=True, env={"PATH": PATH})
    started = {}
    for port, by in enumerate((by_pdsh, by_no_ssh, by_torchrun, by_torchrun), 29_600):
        out = apart if port == 29_603 else tmp_path / by.__name__
        started[out] = by(hosts, hostfile, port, *given, out, log=tmp_path / f"{out.name}.log")
    launch(*given[1:], tmp_path / "one host", ranks=2, form="deepspeed")
    for out, runs in started.items():
        codes, said = {run.wait(timeout=300) for run in runs}, (tmp_path / f"{out.name}.log").read_text()
        if out == apart:
            assert codes == {1}, said  # torchrun's own, for any failure
            assert said.count("error: ") == 1 and f"--out {apart} is another folder on host h2 than for rank 0" in said
            assert not list(apart.glob("checkpoints"))
        else:
            assert codes == {0}, said
            assert_same_run(tmp_path / "one host", out)
    first, second = (line.partition("[")[2] for line in sorted((tmp_path / "by_pdsh.log").read_text().splitlines())
                     if "dist_world_size" in line)
    assert second[:10] > first[:10]
    assert not processes(tmp_path)


def rank_on(host, out: Path) -> int:
    """Process id of the rank that trains on a host."""
    found = [pid for pid, line in processes(out).items() if "general.sh --local_rank=" in line and host.has(pid)]
    return found[0]


def ended(run: subprocess.Popen, out: Path, log: Path) -> str:
    """What all said, when no process of the run is left."""
    assert run.wait(timeout=120) not in (0, 75), log.read_text()
    until(lambda: not processes(out), seconds=60)
    return log.read_text()


def test_a_signal_to_bash_reaches_the_ranks_of_all_hosts(hosts, hostfile, inputs, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    run, = by_pdsh(hosts, hostfile, 29_650, "launch/general.sh", *inputs, "--student", SMALL, *LONG, "--out", out, log=log,
                   shell=True)
    until(lambda: logged(out) > 3, run, seconds=240)
    bash, = (pid for pid, line in processes(out).items() if line.startswith("bash "))
    os.kill(bash, signal.SIGTERM)
    assert run.wait(timeout=120) == 75, log.read_text()
    assert not processes(out)
    last = max(metrics(out))
    assert last < 80 and (out / f"checkpoints/step-{last}").is_dir()
    assert f"h1: stopped after step {last} (" in log.read_text()


def test_faults_between_hosts(hosts, hostfile, inputs, tmp_path):
    """In one run: the master's rank is killed, then all of h2, then h2's link is cut, then h2 is forty times slower.

    After each but the last the run has ended within the timeout, and the same command goes on; at the end it is, bit for bit, the
    run of two ranks on one host.  After the cut h1 alone can go on too, with the same rows."""
    out, given = tmp_path / "run", ["launch/general.sh", *inputs, "--student", SMALL, *LONG, "--out"]
    straight = start(*given[1:], tmp_path / "straight", ranks=2, form="deepspeed", log=tmp_path / "straight.log")

    def begun(port: int) -> tuple[subprocess.Popen, Path]:
        log, before = tmp_path / f"{port}.log", logged(out)
        each = ["--enable_each_rank_log", tmp_path / str(port)] if port == 29_702 else []
        run, = by_pdsh(hosts, hostfile, port, *each, *given, out, log=log)
        until(lambda: logged(out) > before + 3 and max(metrics(out)) > 10 * (port - 29_699), run, seconds=240)
        return run, log

    run, log = begun(29_700)
    os.kill(rank_on(hosts[0], out), signal.SIGKILL)
    assert "h2: error: rank 1 lost another rank" in (said := ended(run, out, log)) and "[10.77.0.1]" in said

    run, log = begun(29_701)
    hosts[1].kill_all()
    assert "h1: error: rank 0 lost another rank" in (said := ended(run, out, log)) and "[10.77.0.2]" in said
    assert f"goes on from {out}/checkpoints/step-" in said

    run, log = begun(29_702)
    hosts[1].link("down")
    ended(run, out, log)  # the runner too, by ssh's keep-alives
    said = {rank: "".join(file.read_text() for file in (tmp_path / "29702").glob(f"*rank{rank}*")) for rank in (0, 1)}
    assert "error: host h1 has not heard of h2 for 24 s" in said[0], said
    assert "error: host h2 has not heard of the master h1 for 24 s" in said[1], said
    hosts[1].link("up")
    shutil.copytree(out, tmp_path / "alone")
    alone = hosts[0].start(sys.executable, *given, tmp_path / "alone", log=tmp_path / "alone.log", **VARIABLES)

    run, log = begun(29_703)
    slow, steps = rank_on(hosts[1], out), logged(out)
    for _ in range(18):  # 36 seconds, which is more than the timeout; its 0.9 s of work are no 40 steps
        os.kill(slow, signal.SIGSTOP)
        time.sleep(1.95)
        os.kill(slow, signal.SIGCONT)
        time.sleep(0.05)
    assert run.poll() is None and logged(out) > steps
    assert run.wait(timeout=240) == 0, log.read_text()
    assert straight.wait(timeout=240) == alone.wait(timeout=240) == 0
    assert_same_run(tmp_path / "straight", out)
    want, got = metrics(tmp_path / "straight"), metrics(tmp_path / "alone")
    assert sorted(got) == sorted(want) and [got[s]["rows"] for s in got] == [want[s]["rows"] for s in want]
    assert max(abs(got[s]["loss"] / want[s]["loss"] - 1) for s in range(1, 81)) < 1e-4  # on one rank sums round otherwise
    assert "ranks was 2, is 1" in (tmp_path / "alone.log").read_text()


def test_two_hosts_build_the_shards_of_one(hosts, text_folder, tokenizer_folder, tmp_path):
    code = "import sys, shards.store, shards.build; shards.store.PIECE_CHARS = 2000; shards.build.main(sys.argv[1:])"
    words = [text_folder, "--tokenizer", tokenizer_folder, "--shards=4", "--held-out=0.1", "--row-length=64", "--workers=1",
             "--out"]
    built = [host.start(sys.executable, "-c", code, *words, tmp_path / out)
             for host, out in zip([*hosts, hosts[0]], ("two", "two", "one"), strict=True)]
    said = [build.communicate(timeout=240)[0] for build in built]
    assert [build.returncode for build in built] == [0, 0, 0], said
    two, one = ({file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in (tmp_path / out).iterdir()}
                for out in ("two", "one"))
    assert two == one and len(two) >= 6


def test_hosts_end_with_the_tests_that_made_them(hosts, tmp_path):
    """Killed as those may be."""
    code = ("import os, sys; from pathlib import Path; from hosts import Hosts; from runs import processes;"
            "folder = Path(sys.argv[1]); Hosts(folder, 1).__enter__();"
            "print(sum('sshd' in line for line in processes(folder).values()), flush=True); os.kill(os.getpid(), 9)")
    ran = subprocess.run([sys.executable, "-c", code, tmp_path / "etc"], cwd=ROOT / "tests", capture_output=True, text=True,
                         check=False)
    assert ran.returncode == -signal.SIGKILL and int(ran.stdout) > 0, ran
    until(lambda: not processes(tmp_path / "etc"))
