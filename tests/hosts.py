"""Hosts for the tests: network namespaces on one machine, each with its address, host name, mounts and sshd.

All of them live in one process namespace, whose first process reads a pipe from the tests: where those end, killed or not, the
kernel ends every process of every host and takes the network away.  Files, keys and /etc of the hosts stand in a folder of
the tests and are mounted inside the namespaces alone.  Needs root, iproute2, openssh-server, pdsh."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from runs import ROOT, until

NEEDED = ("ip", "unshare", "nsenter", "ssh", "sshd", "ssh-keygen", "pdsh")
PATH = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
SSHD = """Port 22
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PidFile none
"""
SSH = """Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  GlobalKnownHostsFile /dev/null
  LogLevel ERROR
"""


def lacking(*more: str) -> str | None:
    """Why hosts, with `more` tools, cannot be made here; None where they can."""
    if missing := [tool for tool in (*NEEDED, *more) if not shutil.which(tool, path=PATH)]:
        return f"hosts need {', '.join(missing)} (Debian: iproute2 openssh-server openssh-client pdsh slurm-wlm)"
    tried = subprocess.run(["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "true"], capture_output=True, text=True)
    return f"hosts need the right to make namespaces: {tried.stderr.strip()}" if tried.returncode else None


def child(pid: int) -> int:
    """The one child of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    until(lambda: children.read_text())
    return int(children.read_text().split()[0])


# Read by every Python there: on all hosts but the first both clocks are ahead, by two days and by 1,000 seconds.
CLOCKS = """import socket, time
if socket.gethostname() != "h1":
    def ahead(clock, by):
        return lambda: clock() + by
    time.time, time.monotonic = ahead(time.time, 2 * 86_400), ahead(time.monotonic, 1_000)
"""


class Host:
    """One machine: h1 at 10.77.0.1, h2 at 10.77.0.2, ..."""

    def __init__(self, number: int, folder: Path, world: int):
        self.name, self.address, self.port, self.folder = f"h{number}", f"10.77.0.{number}", f"to-h{number}", folder
        # It waits for its link, then it is what a machine is that has started.
        script = f"""
            hostname {self.name}; ip link set lo up
            until ip link set eth0 up 2>/dev/null; do sleep 0.05; done
            ip address add {self.address}/24 dev eth0
            exec "$(which sshd)" -D -e -f {folder}/sshd_config"""
        self.shell = subprocess.Popen([*into(world), "unshare", "--net", "--uts", "--mount", "bash", "-ec", script],
                                      stderr=open(folder / f"{self.name}.sshd", "w"), env={"PATH": PATH})
        self.pid = child(self.shell.pid)
        until(lambda: os.readlink(f"/proc/{self.pid}/ns/net") != os.readlink(f"/proc/{world}/ns/net"))
        self.world, self.net = world, os.readlink(f"/proc/{self.pid}/ns/net")
        inside = next(line for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if line.startswith("NSpid:"))
        cable = (f"ip link add {self.port} type veth peer name eth0 netns {inside.split()[-1]}; "
                 f"ip link set {self.port} master bridge up")
        subprocess.run([*into(world), "bash", "-ec", cable], check=True, env={"PATH": PATH})

    def start(self, *command, log: Path | None = None, cwd: Path = ROOT, **variables) -> subprocess.Popen:
        """A command on this host, with an environment of its own."""
        environment = {"PATH": PATH, "HOME": str(Path.home()), "USER": "root", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
                       "PYTHONPATH": f"{self.folder}:{ROOT}", "TOKENIZERS_PARALLELISM": "false", **variables}
        return subprocess.Popen([*into(self.pid), "env", "-C", cwd, *map(str, command)], env=environment, text=True,
                                stdin=subprocess.DEVNULL, stdout=open(log, "a") if log else subprocess.PIPE,
                                stderr=subprocess.STDOUT, start_new_session=True)

    def run(self, *command, **how) -> str:
        """A command to its end, which must be good -> what it said."""
        ran = self.start(*command, **how)
        said, _ = ran.communicate(timeout=300)
        assert ran.returncode == 0, said
        return said

    def link(self, state: str) -> None:
        """`up` or `down`: the cable, seen from the switch."""
        subprocess.run([*into(self.world), "ip", "link", "set", self.port, state], check=True)

    def kill_all(self) -> None:
        """Every process but the sshd that waits for the next login."""
        for pid in sorted(int(process.name) for process in Path("/proc").glob("[0-9]*")):
            if pid != self.pid and self.has(pid):
                os.kill(pid, signal.SIGKILL)

    def has(self, pid: int) -> bool:
        """Whether a process runs on this host."""
        try:
            return os.readlink(f"/proc/{pid}/ns/net") == self.net
        except OSError:
            return False


def into(pid: int) -> list[str]:
    return ["nsenter", f"--target={pid}", "--mount", "--net", "--uts", "--pid"]


class Hosts:
    """So many hosts on one switch, with `folder` for their files; a context, and gone after it."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.count = folder, count

    def __enter__(self) -> list[Host]:
        folder = self.folder
        (folder / "ssh").mkdir(parents=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
        (folder / "sshd_config").write_text(SSHD.format(folder=folder))
        (folder / "sitecustomize.py").write_text(CLOCKS)
        (folder / "ssh/ssh_config").write_text(SSH.format(folder=folder))
        names = "".join(f"10.77.0.{n} h{n}\n" for n in range(1, self.count + 1))
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        self.life = subprocess.Popen(["unshare", "--mount", "--net", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc",
                                      "bash", "-c", "read -r _"], stdin=subprocess.PIPE)
        world = child(self.life.pid)
        until(lambda: os.readlink(f"/proc/{world}/ns/net") != os.readlink("/proc/self/ns/net"))
        subprocess.run([*into(world), "bash", "-ec", f"""
            mount --bind {folder}/hosts /etc/hosts; mount --bind {folder}/ssh /etc/ssh
            mount -t tmpfs tmpfs /run; mkdir /run/sshd
            ip link add bridge type bridge; ip link set bridge up"""], check=True, env={"PATH": PATH})
        hosts = [Host(n, folder, world) for n in range(1, self.count + 1)]
        for host in hosts:
            until(lambda host=host: hosts[0].start("ssh", host.name, "true").wait() == 0)
        return hosts

    def __exit__(self, *_) -> None:
        self.life.stdin.close()
        self.life.wait()
