"""deploy/compose under podman, in a folder and an image store of its own.

    python tests/deploy/compose_project.py FOLDER     builds the image and makes the project

Debian, as root: `apt-get install podman debootstrap`, `pip install podman-compose`. Where no
registry of images is reached, the image that the Dockerfile begins with is stood in for by Debian
with this machine's Python. pip in the build uses this machine's pip configuration.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("podman", "podman-compose", "debootstrap")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
BASE = f"docker.io/library/python:{PYTHON}-slim"

# What Python's own modules link to.
_LIBRARIES = (
    "ca-certificates,libbz2-1.0,libffi8,liblzma5,libncursesw6,libreadline8,libsqlite3-0,"
    "libssl3,libuuid1,zlib1g"
)
_STORAGE = '[storage]\ndriver = "overlay"\ngraphroot = "{0}/graph"\nrunroot = "{0}/run"\n'
# Without systemd, and within this process's own limits.
_ENGINE = """[containers]
default_ulimits = ["nofile={0}:{0}", "nproc={1}:{1}"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "{2}"
"""


def missing() -> list[str]:
    """Return what a project needs and this machine lacks."""
    lacks = [name for name in PROGRAMS if not shutil.which(name, path=_path())]
    return [*lacks, *(["root"] if os.geteuid() else [])]


def _path() -> str:
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


@dataclass
class ComposeProject:
    """The compose file in a folder; `store` holds images and containers."""

    folder: Path
    store: Path

    def __post_init__(self) -> None:
        for folder in (self.folder, self.folder / "data", self.folder / "credentials", self.store):
            folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "deploy" / "compose" / "compose.yaml", self.folder)
        (self.store / "storage.conf").write_text(_STORAGE.format(self.store))
        limits = (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC)
        # Unlimited is -1.
        most = [min(resource.getrlimit(limit)[1] % 2**63, 2**15) for limit in limits]
        runtime = "runc" if shutil.which("runc") else "crun"
        (self.store / "containers.conf").write_text(_ENGINE.format(*most, runtime))
        self.variables = {
            **{k: v for k, v in os.environ.items() if k not in ("NODE_0", "NODE_1", "DATA")},
            "PATH": _path(),
            "CONTAINERS_CONF": str(self.store / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.store / "storage.conf"),
        }

    def run(self, *words: str, seconds: float = 120, check: bool = True) -> str:
        """Run a command in the folder; return what it printed."""
        done = subprocess.run(
            words,
            cwd=self.folder,
            env=self.variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.returncode}\n{done.stdout[-4000:]}")
        return done.stdout

    def compose(self, *words: str, seconds: float = 120, check: bool = True) -> str:
        """Run podman-compose."""
        return self.run("podman-compose", *words, seconds=seconds, check=check)

    def has(self, image: str) -> bool:
        """Whether the store has an image."""
        found = self.run("podman", "images", "--format={{.Repository}}:{{.Tag}}")
        return image in found.split()

    def make_base(self) -> None:
        """Make an image of the name that the Dockerfile begins with."""
        system, prefix = self.store / "base", Path(sys.base_prefix)
        self.run(
            *(
                "debootstrap",
                "--variant=minbase",
                f"--include={_LIBRARIES}",
                release(),
                str(system),
            ),
            seconds=900,
        )
        local = system / "usr" / "local"
        kept = shutil.ignore_patterns("site-packages", "test", "tests", "__pycache__", "*.a")
        shutil.copytree(
            prefix / "lib", local / "lib", symlinks=True, ignore=kept, dirs_exist_ok=True
        )
        binary = local / "bin" / f"python{PYTHON}"
        shutil.copy2(prefix / "bin" / f"python{PYTHON}", binary)
        for name in ("python", "python3"):
            (binary.parent / name).symlink_to(binary.name)
        (local / "lib" / f"python{PYTHON}" / "site-packages").mkdir()
        self.run("chroot", str(system), "ldconfig")
        self.run("chroot", str(system), "/usr/local/bin/python", "-m", "ensurepip")
        (local / "bin" / "pip").symlink_to("pip3")
        archive = self.store / "base.tar"
        self.run("tar", "-C", str(system), "-cf", str(archive), ".", seconds=300)
        change = 'ENV PATH="/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"'
        self.run("podman", "import", "--change", change, str(archive), BASE, seconds=300)
        archive.unlink()
        shutil.rmtree(system)

    def build(self, *words: str) -> str:
        """Build the image from the checkout, with this machine's pip configuration."""
        settings, mounts = pip_configuration()
        (self.store / "pip.conf").write_text(settings)
        mounts[self.store / "pip.conf"] = "/etc/pip.conf"
        volumes = [f"--volume={source}:{target}:ro" for source, target in mounts.items()]
        return self.run(
            *("podman", "build", "--network=host", "--pull=never", *volumes, *words),
            *(f"--build-arg=PYTHON={PYTHON}", "--file", str(ROOT / "deploy/compose/Dockerfile")),
            *("--tag=fomoe", str(ROOT)),
            seconds=1800,
        )

    def containers(self, service: str = "") -> dict[str, str]:
        """Return {name: state} of the project's containers."""
        found = json.loads(self.run("podman", "ps", "--all", "--format=json") or "[]")
        return {c["Names"][0]: c["State"] for c in found if service in c["Names"][0]}

    def pid(self, service: str) -> int:
        """Return the process of a service's container, as this machine numbers it."""
        return int(self.run("podman", "inspect", "--format={{.State.Pid}}", self.name(service)))

    def name(self, service: str) -> str:
        """Return the name of a service's container."""
        return f"{self.folder.name}_{service}_1"

    def wait_until_healthy(self, *services: str, seconds: float = 120) -> None:
        """Wait until the health checks succeed; podman needs systemd to run them by itself."""
        deadline = time.monotonic() + seconds
        for service in services:
            while True:
                try:
                    self.run("podman", "healthcheck", "run", self.name(service))
                    break
                except RuntimeError as error:
                    if time.monotonic() > deadline:
                        log = self.run("podman", "logs", "--tail=30", self.name(service))
                        raise RuntimeError(f"{service} is not healthy: {error}\n{log}") from error
                time.sleep(1)

    def inside(self, service: str, *words: str, check: bool = True) -> str:
        """Run a command in a service's container."""
        return self.run("podman", "exec", self.name(service), *words, check=check)

    def down(self) -> None:
        """End the containers; remove them with their volumes."""
        profiles = [f"--profile={name}" for name in ("server", "node", "admin")]
        self.compose(*profiles, "down", "--volumes", seconds=180, check=False)


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def release() -> str:
    """Return the name of this machine's Debian."""
    text = Path("/etc/os-release").read_text(encoding="utf-8")
    found = re.search(r"^VERSION_CODENAME=(\w+)", text, re.MULTILINE)
    return found[1] if found else "stable"


def pip_configuration() -> tuple[str, dict[Path, str]]:
    """Return this machine's pip configuration as a file, and the paths that it names."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings: dict[str, str] = {}
    for key, value in re.findall(r"^(?:global|:env:)\.([\w-]+)='(.*)'$", listed, re.MULTILINE):
        # What the environment says comes first in the list, and holds.
        settings.setdefault(key, value)
    mounts: dict[Path, str] = {}
    for word in " ".join(settings.values()).split():
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists():
            # An index links to files beside it.
            top = Path(*path.parts[:3])
            mounts[top] = str(top)
    lines = [f"{key} = {value}" for key, value in settings.items()]
    return "\n".join(["[global]", *lines, ""]), mounts


if __name__ == "__main__":
    made = Path(sys.argv[1]).resolve()
    project = ComposeProject(made / "project", made / "store")
    if not project.has(BASE):
        project.make_base()
    print(project.build(*sys.argv[2:]))
