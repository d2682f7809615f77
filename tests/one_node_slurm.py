"""A SLURM of one node on this machine, for tests: starts and stops munged, slurmctld and slurmd by itself."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
KillWait=30
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 RealMemory=2000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Return why no SLURM can be started here; None where one can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "a SLURM of one's own needs root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return f"no {', '.join(absent)}: apt-get install --no-install-recommends slurm-wlm munge" if absent else None


@contextmanager
def running_slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Run a SLURM in a folder with a short path; yield the environment variables of its commands."""
    for part in ("state", "spool"):
        (folder / part).mkdir(parents=True)
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, ports=_free_ports(2), folder=folder))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    environment = {
        **os.environ,
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": f"{os.environ['PATH']}:/usr/sbin",
    }
    files = {"key": "key", "socket": "sock", "pid": "pid", "log": "log", "seed": "seed"}
    places = [f"--{what}{'' if what == 'socket' else '-file'}={folder}/munge.{name}" for what, name in files.items()]
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> subprocess.Popen[bytes]:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        started.append(subprocess.Popen(command, env=environment, **quiet))  # type: ignore[call-overload]
        return started[-1]

    try:
        start("munged", "--foreground", "--force", *places)
        wait(lambda: (folder / "munge.sock").exists(), 10)
        start("slurmctld", "-D", "-c")
        for plugin in (
            "disabled",
            "cgroup/v1",
            "cgroup/v2",
        ):  # a container has no control groups; before 23.11 one must
            (folder / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
            slurmd = start("slurmd", "-D")
            time.sleep(2)
            if slurmd.poll() is None:
                break
        state = ["sinfo", "--noheader", "--format=%t"]
        wait(lambda: subprocess.run(state, env=environment, capture_output=True).stdout.strip() == b"idle", 60)
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
        queue = ["squeue", "--noheader"]
        with suppress(AssertionError):  # without their daemons, processes of jobs would stay
            wait(lambda: not subprocess.run(queue, env=environment, capture_output=True).stdout.strip(), 60)
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()


def wait(condition: Callable[[], bool], timeout_s: float) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still not after {timeout_s:g} s"
        time.sleep(0.3)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
