"""The folder that `flwr run` bundles: the checkout, or one made of an installed package's files."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fomoe_flwr.config import SettingsError, conf_dir

_PACKAGE = Path(__file__).resolve().parents[2]
_ENTRIES = ("server_app.py", "client_app.py")


@contextlib.contextmanager
def app_folder() -> Iterator[Path]:
    """Give the folder to bundle; remove it at the end if it was made for this.

    Bundles of a checkout and of an installed package have the same bytes. Raises SettingsError
    for an incomplete installation.
    """
    root, shipped = _PACKAGE.parent, _PACKAGE / "bundle"
    if all((root / name).is_file() for name in ("pyproject.toml", *_ENTRIES)):
        yield root
        return
    with tempfile.TemporaryDirectory(prefix="fomoe-app-") as made:
        folder = Path(made)
        files = {path: path.relative_to(root) for path in _PACKAGE.rglob("*.py")}
        conf = conf_dir()
        files |= {path: "conf" / path.relative_to(conf) for path in conf.rglob("*.yaml")}
        files |= {shipped / f"{name}.txt": Path(name) for name in _ENTRIES}
        files[shipped / "pyproject.toml"] = Path("pyproject.toml")
        for path, name in files.items():
            if not path.is_file():
                raise SettingsError(f"no {path}: reinstall fomoe-flwr, or use engine=in_process")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
        yield folder
