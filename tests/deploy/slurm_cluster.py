"""A SLURM cluster of one node on this machine, in a folder of its own.

    python tests/deploy/slurm_cluster.py FOLDER        starts it and prints what to export
    python tests/deploy/slurm_cluster.py FOLDER stop   ends it

No accounting, no cgroups, munge on its own key and socket, ports of its own: nothing outside the
folder is read or changed, so it runs beside another SLURM. Debian: `apt-get install slurmctld
slurmd slurm-client munge`.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=20
KillWait=5
MinJobAge={min_job_age}
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,requeue_setup_env_fail
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000 State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Return the programs that a cluster needs and this machine lacks."""
    return [name for name in PROGRAMS if not shutil.which(name, path=_path())]


class Cluster:
    """The daemons of a cluster and the environment of its commands."""

    def __init__(self, folder: Path, cpus: int = 2, min_job_age: int = 300) -> None:
        self.folder = folder.resolve()
        self.cpus, self.min_job_age = cpus, min_job_age
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": _path(),
        }

    def start(self) -> None:
        """Start munge, the controller and the node, and wait until the node is idle."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # munge trusts no folder that others may write.
        self.folder.chmod(0o755)
        for name in ("state", "spool"):
            (self.folder / name).mkdir(exist_ok=True)
        key = self.folder / "munge.key"
        if not key.exists():
            key.touch(0o600)
            key.write_bytes(os.urandom(1024))
        conf = _CONF.format(
            host=_host(),
            user=getpass.getuser(),
            folder=self.folder,
            ports=(_free_port(), _free_port()),
            cpus=self.cpus,
            min_job_age=self.min_job_age,
        )
        (self.folder / "slurm.conf").write_text(conf)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log"}
        words = [f"--{word}={self.folder}/munge.{name}" for word, name in files.items()]
        seed = f"--seed-file={self.folder}/munge.seed"
        self._run("munged", "--force", *words, seed)
        self.start_controller()
        self.start_node()
        self._wait_for(lambda: "idle" in self._run("sinfo", "--noheader", "--format=%t"))

    def start_controller(self) -> None:
        """Start the controller; it knows what it knew before."""
        self._run("slurmctld", "-L", str(self.folder / "slurmctld.log"))

    def start_node(self) -> None:
        """Start the node."""
        self._run("slurmd", "-L", str(self.folder / "slurmd.log"))

    def fail_node(self) -> None:
        """Let the controller think that the node is down."""
        self._run("scontrol", "update", f"nodename={_host()}", "state=down", "reason=test")

    def resume_node(self) -> None:
        """Bring the node back, and wait until it takes jobs."""
        # It may have come back by itself, which makes this an error.
        with contextlib.suppress(subprocess.CalledProcessError):
            self._run("scontrol", "update", f"nodename={_host()}", "state=resume")
        self._wait_for(lambda: "idle" in self._run("sinfo", "--noheader", "--format=%t"))

    def stop(self) -> None:
        """End all jobs and all daemons."""
        with contextlib.suppress(subprocess.SubprocessError, TimeoutError):
            self._run("scancel", f"--user={getpass.getuser()}", seconds=10)
            self._wait_for(lambda: not self._run("squeue", "--noheader"), 20)
        for name in ("slurmd", "slurmctld", "munge"):
            self.end(name)

    def end(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        """End one daemon and wait until it is gone."""
        path = self.folder / f"{name}.pid"
        if not path.exists():
            return
        pid = int(path.read_text())
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
            self._wait_for(lambda: not _alive(pid))
        path.unlink(missing_ok=True)

    def run(self, *command: str) -> str:
        """Run one of SLURM's commands; return what it printed."""
        return self._run(*command)

    def _run(self, *command: str, seconds: float = 60) -> str:
        done = subprocess.run(
            command,
            env=self.environment,
            timeout=seconds,
            check=False,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            print(f"{' '.join(command)}: {done.stdout}", file=sys.stderr)
            done.check_returncode()
        return done.stdout

    def _wait_for(self, ready: object, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not ready():  # type: ignore[operator]
            if time.monotonic() > end:
                raise TimeoutError(f"nothing after {seconds} s, see the logs in {self.folder}")
            time.sleep(0.2)


def _path() -> str:
    # Debian keeps the daemons where only root looks.
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _host() -> str:
    return socket.gethostname().partition(".")[0]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


if __name__ == "__main__":
    cluster = Cluster(Path(sys.argv[1]))
    if sys.argv[2:] == ["stop"]:
        cluster.stop()
    elif absent := missing():
        sys.exit(f"not installed: {', '.join(absent)}")
    else:
        cluster.start()
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}")
