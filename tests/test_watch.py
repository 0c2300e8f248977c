"""Hosts that fall silent: who says so, and of whom.  Processes in the place of hosts; test_hosts.py has real ones."""

import signal
import socket
import subprocess
import sys

import pytest
from runs import ROOT, until

CODE = """
import os, sys, torch.distributed as dist
from pretrain.ranks import watch
rank = int(sys.argv[1])
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
store = dist.TCPStore("127.0.0.1", int(sys.argv[2]), is_master=rank == 0, world_size=2)  # they wait for each other
print("begins", flush=True)
watch({0: "h1", 1: "h2"}, rank, 10)
"""


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
@pytest.mark.parametrize("victim, said", [(0, "host h2 has not heard of the master h1 for 8 s"),
                                          (1, "host h1 has not heard of h2 for 8 s")])
def test_a_silent_host_is_named_by_the_other(victim, said, number):
    """A stopped master is a store that takes what is sent and never answers, as behind a cut link."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    hosts = [subprocess.Popen([sys.executable, "-c", CODE, str(rank), port], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE) for rank in range(2)]
    try:
        assert [host.stdout.readline() for host in hosts] == ["begins\n"] * 2
        hosts[victim].send_signal(number)
        other = hosts[1 - victim]
        until(lambda: other.poll() is not None)
        assert other.returncode == 1
        assert f"error: {said}; the same command goes on from the last checkpoint" in other.stderr.read()
    finally:
        for host in hosts:
            host.kill()
            host.wait()
