"""A Debian whose process 1 is systemd, in a folder, to try deploy/systemd on.

    python tests/deploy/systemd_machine.py FOLDER     makes it, installs the package, boots it

As root: `apt-get install debootstrap systemd-container`. It sees a loopback network only, except
while the package is installed; pip then uses this machine's pip configuration.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from compose_project import ROOT, pip_configuration, release

PROGRAMS = ("debootstrap", "systemd-nspawn", "nsenter", "unshare")
HOST = "link.example.org"
"""The SuperLink's name in docs/deploy.md."""

_PACKAGES = "python3,python3-venv,dbus,systemd,systemd-sysv,ca-certificates"
# systemd needs cgroup2 and a group of its own, whatever this machine mounts.
_ALONE = """
if [ "$(stat -fc %T /sys/fs/cgroup)" != cgroup2fs ]; then
    umount -l /sys/fs/cgroup
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
fi
own=/sys/fs/cgroup/fomoe-$$
mkdir $own
echo $$ > $own/cgroup.procs
status=0
systemd-nspawn --quiet --register=no --keep-unit --console=pipe "$@" || status=$?
echo $$ > /sys/fs/cgroup/cgroup.procs
find $own -depth -type d -exec rmdir {} ';'
exit $status
"""
_CHECKOUT = "/mnt/checkout"


def missing() -> list[str]:
    """Return what a machine needs and this one lacks."""
    return [*(n for n in PROGRAMS if not shutil.which(n)), *(["root"] if os.geteuid() else [])]


def blocks() -> dict[str, str]:
    """Return the commands of docs/deploy.md for real hosts: {step: commands}."""
    text = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    part = text.partition("## On real hosts")[2].partition("\n## ")[0]
    found = re.findall(r"^\d\. \*\*(\w+)\*\*.*?```bash\n(.*?)```", part, re.DOTALL | re.MULTILINE)
    return {step: re.sub("^   ", "", commands, flags=re.MULTILINE) for step, commands in found}


@dataclass
class SystemdMachine:
    """A machine whose files are in `root`."""

    root: Path
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)

    def make(self) -> None:
        """Install the system, then the package as docs/deploy.md says."""
        words = ["debootstrap", f"--include={_PACKAGES}", release(), str(self.root)]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, timeout=900)
        with (self.root / "etc" / "hosts").open("a") as hosts:
            hosts.write(f"127.0.0.1 localhost {HOST}\n")
        settings, mounts = pip_configuration()
        (self.root / "etc" / "pip.conf").write_text(settings)
        mounts[ROOT] = _CHECKOUT
        binds = [f"--bind-ro={source}:{target}" for source, target in mounts.items()]
        script = f"cd {_CHECKOUT}\n{blocks()['Install']}"
        words = [*_nspawn(self.root), *binds, "bash", "-exc", script]
        subprocess.run(words, check=True, timeout=1800, stdin=subprocess.DEVNULL)
        environment = self.root / "etc" / "fomoe" / "environment"
        text = environment.read_text().replace("OMP_NUM_THREADS=8", "OMP_NUM_THREADS=1")
        environment.write_text(text)
        # What is left of the checkout: example files.
        shutil.copytree(ROOT / "deploy", self.root / "root" / "deploy", dirs_exist_ok=True)

    def boot(self, log: Path) -> None:
        """Start process 1; return when all that is enabled was started."""
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                [*_nspawn(self.root), "--private-network", "--boot"],
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
            )
        self.wait(lambda: self.leader() != 0, 120)
        self.wait(lambda: self.run("systemctl is-system-running", check=False) in _BOOTED, 120)

    def leader(self) -> int:
        """Return process 1 as this machine numbers it; 0 while there is none."""
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError("the machine is off")
        for child in psutil.Process(self._process.pid).children(recursive=True):
            try:
                status = Path(f"/proc/{child.pid}/status").read_text(encoding="utf-8")
                name = Path(f"/proc/{child.pid}/comm").read_text(encoding="utf-8")
            except OSError:
                continue
            if re.search(r"^NSpid:.*\t1$", status, re.MULTILINE) and name == "systemd\n":
                return child.pid
        return 0

    def run(self, script: str, check: bool = True, seconds: float = 300) -> str:
        """Run commands on the machine as root; return what they printed."""
        variables = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}
        done = subprocess.run(
            ["nsenter", "--all", f"--target={self.leader()}", "bash", "-ec", f"cd /root\n{script}"],
            env=variables,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{script}: {done.returncode}\n{done.stdout[-4000:]}")
        return done.stdout.strip()

    def follow(self, step: str, changes: Mapping[str, str] | None = None) -> str:
        """Run a step of docs/deploy.md, with other names if it is repeated."""
        script = blocks()[step]
        for old, new in (changes or {}).items():
            script = script.replace(old, new)
        return self.run(script)

    def reboot(self, log: Path) -> None:
        """Shut down in order and boot again."""
        assert self._process is not None
        self.run("systemctl reboot", check=False)
        self._process.wait(timeout=180)
        self.boot(log)

    def wait(self, is_so: Callable[[], bool], seconds: float) -> None:
        """Wait for something. Raises TimeoutError."""
        deadline = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited for {seconds:g} s")
            time.sleep(0.5)

    def off(self) -> None:
        """End every process of the machine."""
        if self._process is not None and self._process.poll() is None:
            if leader := self.leader():
                os.kill(leader, signal.SIGKILL)
            try:
                self._process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


_BOOTED = ("running", "degraded")


def _nspawn(root: Path) -> list[str]:
    return ["unshare", "-m", "--propagation=private", "sh", "-ec", _ALONE, "sh", f"-D{root}"]


if __name__ == "__main__":
    machine = SystemdMachine(Path(sys.argv[1]).resolve() / "root")
    if not (machine.root / "opt" / "fomoe").exists():
        machine.make()
    machine.boot(machine.root.parent / "console.log")
    print(f"up: nsenter -a -t {machine.leader()}; its power switch is Ctrl-C", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        signal.pause()
    finally:
        machine.off()
