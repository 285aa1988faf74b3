"""What `flwr run` bundles, from a checkout and from an installed package."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from fomoe_flwr.federation.deployment.app_folder import app_folder

ROOT = Path(__file__).resolve().parents[2]
BUILD = """
import sys
from pathlib import Path
from flwr.cli.build import build_fab_from_disk
from fomoe_flwr.errors import InputError
from fomoe_flwr.federation.deployment.app_folder import app_folder
try:
    with app_folder() as folder:
        Path("folder").write_text(str(folder))
        Path("bundle").write_bytes(build_fab_from_disk(folder))
except InputError as error:
    sys.exit(f"error: {error}")
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The files of a wheel, as pyproject.toml says, without the checkout around them."""
    site = tmp_path / "site"
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    wheel = wheel["targets"]["wheel"]
    for name in wheel["packages"]:
        shutil.copytree(ROOT / name, site / name, ignore=shutil.ignore_patterns("__pycache__"))
    for source, target in wheel["force-include"].items():
        (site / target).parent.mkdir(exist_ok=True)
        (shutil.copytree if (ROOT / source).is_dir() else shutil.copyfile)(
            ROOT / source, site / target
        )
    return site


def build(installed: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BUILD],
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"},
        cwd=installed.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_bundle_has_both_apps_the_package_and_its_settings_and_no_tests() -> None:
    from flwr.cli.build import build_fab_from_disk

    with app_folder() as root:
        assert root == ROOT
        bundle = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(root)))
    names = {name for name in bundle.namelist() if not name.startswith(".info/")}
    wanted = {"pyproject.toml", "server_app.py", "client_app.py"}
    for pattern in ("conf/**/*.yaml", "fomoe_flwr/**/*.py"):
        wanted |= {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern)}
    assert len(wanted) > 40
    assert names == wanted
    for name in wanted - {"pyproject.toml"}:
        assert bundle.read(name) == (ROOT / name).read_bytes()


def test_an_installed_package_makes_the_same_bundle_and_leaves_nothing(installed: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    done = build(installed)
    assert done.returncode == 0, done.stderr
    assert (installed.parent / "bundle").read_bytes() == build_fab_from_disk(ROOT)
    made = Path((installed.parent / "folder").read_text())
    assert not made.exists()
    assert installed not in made.parents


def test_an_installation_without_its_entries_is_told_in_a_line(installed: Path) -> None:
    missing = installed / "fomoe_flwr" / "bundle" / "pyproject.toml"
    missing.unlink()
    done = build(installed)
    line = f"error: no {missing}: reinstall fomoe-flwr, or use engine=in_process\n"
    assert (done.returncode, done.stderr) == (1, line)
