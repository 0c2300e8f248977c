"""launch/slurm.sbatch under a real Slurm: two nodes, each a host of its own, munge, no cgroups."""

import os
from pathlib import Path

import pytest
from hosts import Host, lacking
from runs import SETTINGS, SMALL, assert_same_run, logged, processes, start, until

from pretrain.engine import join

CONF = """
ClusterName=test
SlurmctldHost=h1(10.77.0.1)
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=120
NodeName=h[1-2] NodeAddr=10.77.0.[1-2] CPUs=1
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL PriorityTier=9 PreemptMode=OFF
"""


class Slurm:
    """Its commands, on h1."""

    def __init__(self, host: Host, folder: Path):
        self.host, self.folder = host, folder

    def __call__(self, *command, **variables) -> str:
        return self.host.run(*command, SLURM_CONF=str(self.folder / "slurm.conf"), **variables).strip()

    def queue(self) -> list[str]:
        return self("squeue", "--noheader", "--format=%i %T %r").splitlines()


@pytest.fixture
def slurm(hosts, tmp_path):
    if why := lacking("munged", "slurmctld", "slurmd", "sbatch"):
        pytest.skip(why)
    folder = tmp_path / "slurm"
    (folder / "state").mkdir(parents=True)
    (folder / "slurm.conf").write_text(CONF.format(folder=folder))
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    hosts[0].run("install", "-d", "-m", "755", "/run/munge")  # /run is the hosts' own
    files = [f"--{name}={folder}/{name}" for name in ("log-file", "pid-file", "seed-file")]
    munged = hosts[0].start("munged", "--foreground", "--force", f"--key-file={folder}/key", *files, log=folder / "munged")
    until(lambda: hosts[0].start("munge", "-n").wait() == 0, munged)
    daemons = [host.start(name, "-D", log=folder / f"{name}-{host.name}", SLURM_CONF=str(folder / "slurm.conf"))
               for host, name in ((hosts[0], "slurmctld"), *((host, "slurmd") for host in hosts))]
    made = Slurm(hosts[0], folder)
    until(lambda: "idle 2" in hosts[0].start("sinfo", "--noheader", "--partition=usual", "--format=%T %D",
                                             SLURM_CONF=str(folder / "slurm.conf")).communicate()[0], daemons[0])
    yield made
    for host in hosts:
        host.kill_all()
    for daemon in (munged, *daemons):
        daemon.wait()


@pytest.mark.hosts
def test_a_job_is_cancelled_then_preempted_and_loses_no_row(slurm, inputs, tmp_path):
    """Cancelled it saves, leaves no process and stays out of the queue.  Started again it goes on; preempted by a job of higher
    priority it saves within the grace time, puts itself back into the queue, goes on by itself and ends as a straight run."""
    out, log, given = tmp_path / "run", tmp_path / "log", [*inputs, "--student", SMALL, *SETTINGS, "steps=60", "save_every=20"]
    straight = start(*given, "--out", tmp_path / "straight", ranks=2, form="deepspeed", log=tmp_path / "straight.log")

    def submitted() -> str:
        before = logged(out)
        job = slurm("sbatch", "--parsable", "--ntasks-per-node=1", f"--output={log}", "launch/slurm.sbatch", *given, "--out", out,
                    DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="eth0")
        until(lambda: logged(out) > before + 3, seconds=240)
        return job

    job = submitted()
    slurm("scancel", job)
    until(lambda: not slurm.queue() and not processes(out))
    assert "JobState=CANCELLED" in slurm("scontrol", "show", "job", job)
    assert log.read_text().count("the same command goes on (exit code 75)") == 1

    job = submitted()
    assert log.read_text().count(f"goes on from {out}/checkpoints/step-") == 1
    urgent = slurm("sbatch", "--parsable", "--nodes=2", "--partition=urgent", "--output=/dev/null", "--wrap=sleep 1")
    until(lambda: f"{job} PENDING BeginTime" in slurm.queue())
    assert log.read_text().count("the same command goes on (exit code 75)") == 2
    until(lambda: not any(line.startswith(urgent) for line in slurm.queue()))
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # Slurm lets a job that went back wait for two minutes
    until(lambda: not slurm.queue(), seconds=240)
    assert "JobState=COMPLETED" in (shown := slurm("scontrol", "show", "job", job)) and "Restarts=1" in shown
    assert log.read_text().count(f"goes on from {out}/checkpoints/step-") == 2
    assert straight.wait(timeout=120) == 0
    assert_same_run(tmp_path / "straight", out)
    assert not processes(out)


@pytest.mark.parametrize("given", [{"SLURM_NTASKS": "2"}, {"OMPI_COMM_WORLD_SIZE": "2"},
                                   {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}])
def test_tasks_that_cannot_meet_are_no_runs_of_their_own(given, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="2 tasks were started, but RANK is not set in them.*launch/slurm.sbatch"):
        join()
