"""The page of all settings says what the code says."""

from __future__ import annotations

import runpy
from pathlib import Path

from fomoe_flwr.config import Settings, conf_dir

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "settings_reference.py"


def test_the_page_of_settings_is_up_to_date() -> None:
    written = runpy.run_path(str(SCRIPT))
    page = written["PAGE"].read_text(encoding="utf-8")
    assert page == written["reference"](), "run: python scripts/settings_reference.py"
    assert "| `layout.overlap` | `2` | integer >= 1 |" in page
    for key in Settings().to_dict():
        assert f"| `{key}` |" in page or f"## `{key}`" in page
    for path in conf_dir().glob("*/*.yaml"):
        assert f"| `{path.stem}` |" in page or path.parent.name == "paper"
