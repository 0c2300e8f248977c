"""What a step sends between hosts, and what a checkpoint costs: a run of tiny4 on network namespaces of this machine.

    python tests/bench/hosts.py SHARDS TEACHER [--hosts 2]         (as root; see tests/hosts.py)

Bytes are those that each host's interface has sent, over eight steps; so they hold heartbeats and what TCP adds."""

import argparse
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from hosts import Hosts, lacking  # noqa: E402
from runs import logged, until  # noqa: E402

TIMED = """
import sys, time
from pretrain import checkpoint, engine, general
save = checkpoint.save
def timed(folder, engines, *rest, **named):
    begin = time.perf_counter()
    tag = save(folder, engines, *rest, **named)
    size = sum(file.stat().st_size for file in tag.rglob("*") if file.is_file())
    print(f"saved {size} bytes of {sum(p.numel() for p in engines[0].module.parameters())} parameters in "
          f"{time.perf_counter() - begin:.2f} s", flush=True)
    return tag
checkpoint.save = timed
general.main()
"""


def sent(host) -> int:
    return int(host.run("cat", "/proc/net/dev").partition("eth0:")[2].split()[8])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("shards")
    parser.add_argument("teacher")
    parser.add_argument("--hosts", type=int, default=2)
    given = parser.parse_args()
    if why := lacking():
        sys.exit(why)
    folder = Path(tempfile.mkdtemp())
    out, batch = folder / "run", 8 * given.hosts
    (folder / "timed.py").write_text(TIMED)
    words = [folder / "timed.py", "--shards", Path(given.shards).resolve(), "--teacher", Path(given.teacher).resolve(),
             "--student", "tiny4", "--out", out, f"batch={batch}", "steps=16", "log_every=1", "save_every=16", "init=random"]
    with Hosts(folder / "etc", given.hosts) as hosts:
        runs = [host.start("torchrun", "--nnodes", given.hosts, "--nproc-per-node", 1, "--node-rank", n, "--master-addr", "h1",
                           "--master-port", 29_500, *words, log=folder / "log", DS_ACCELERATOR="cpu")
                for n, host in enumerate(hosts)]
        until(lambda: logged(out) >= 5, runs[0], seconds=300)
        steps, before = logged(out), [sent(host) for host in hosts]
        until(lambda: logged(out) >= steps + 8, runs[0], seconds=300)
        a_step = [(sent(host) - was) / (logged(out) - steps) for host, was in zip(hosts, before, strict=True)]
        assert [run.wait(timeout=300) for run in runs] == [0] * given.hosts, (folder / "log").read_text()
    said = re.findall(r"saved (\d+) bytes of (\d+) parameters in ([\d.]+) s", (folder / "log").read_text())
    size, parameters = map(int, said[-1][:2])
    print(f"{given.hosts} hosts, {parameters:,} parameters: each host sends {', '.join(f'{n / 1e6:.2f}' for n in a_step)} MB a "
          f"step = {max(a_step) / parameters:.2f} bytes a parameter; a checkpoint is {size:,} bytes = {size / parameters:.1f} a "
          f"parameter, saved in {said[-1][2]} s")


if __name__ == "__main__":
    main()
