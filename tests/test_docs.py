"""The documentation: it builds without a warning, and what it tells people to type works.

A page is a session: its shell blocks are run in order, in one empty folder (with `benchmarks/`
and other folders of the checkout beside it). A block that cannot be run says why in a comment
before it:

    <!-- not run: REASON -->

Running pages is slow. What is fast is that every block parses, also one that is not run, that its
`fomoe` commands exist with these options, and that the reason is one.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest

from fomoe_flwr.cli.main import command_parser

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELLS = ("bash", "sh", "shell", "console")
BLOCK = re.compile(
    r"(?:<!--\s*(?P<mark>not run)\s*:\s*(?P<reason>.*?)\s*-->\s*\n\s*)?"
    r"^[ \t]*```[ \t]*\{?(?P<language>[\w-]*)\}?[^\n]*\n(?P<body>.*?)^[ \t]*```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    mark: str
    reason: str
    body: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def shell_blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page,
            text.count("\n", 0, found.start()) + 1,
            found["mark"] or "",
            found["reason"] or "",
            found["body"],
        )
        for found in BLOCK.finditer(text)
        if found["language"] in SHELLS
    ]


BLOCKS = [block for page in PAGES for block in shell_blocks(page)]
SESSIONS = [
    page
    for page in PAGES
    # Its blocks are one session, and leave processes: tests/test_deploy_docs.py runs them.
    if page.name != "deploy.md" and any(b.mark != "not run" for b in shell_blocks(page))
]


def test_the_blocks_are_found() -> None:
    names = {block.page.name for block in BLOCKS}
    assert {"README.md", "tutorial.md", "how-to.md", "sweeps.md", "report.md"} <= names
    assert len(BLOCKS) > 15


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_every_block_parses_and_says_why_it_is_not_run(block: Block) -> None:
    checked = subprocess.run(
        ["bash", "-n"], input=block.body, text=True, capture_output=True, check=False
    )
    assert checked.returncode == 0, f"{block.place}: {checked.stderr}"
    if block.mark:
        assert len(block.reason.split()) >= 3, f"{block.place}: say why it is {block.mark}"


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.place)
def test_every_fomoe_command_is_one(block: Block) -> None:
    """Also of blocks that are not run: a command that was renamed is found here."""
    parser = command_parser()
    for line in block.body.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "!":
            words = words[1:]
        if not words or words[0] != "fomoe" or "$" in line:
            continue
        try:
            parser.parse_args(words[1:])
        except SystemExit:
            pytest.fail(f"{block.place}: fomoe does not take: {line}")


@pytest.mark.slow
@pytest.mark.parametrize("page", SESSIONS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_work(page: Path, tmp_path: Path) -> None:
    for name in ("benchmarks", "conf", "tests", "docs", "examples", "deploy"):
        if (ROOT / name).exists():
            (tmp_path / name).symlink_to(ROOT / name)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "FLWR_HOME": str(tmp_path / "flower"),
    }
    for block in shell_blocks(page):
        if block.mark == "not run":
            continue
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block.body],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, f"{block.place}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_the_readmes_table_is_what_its_command_prints() -> None:
    command = [
        "benchmarks/experiments.py",
        "--from-json",
        "benchmarks/results/demo.json",
        "--readme",
    ]
    printed = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    table, provenance = printed.strip().split("\n\n")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert table in readme
    commit = re.search(r"commit (\w+)", provenance)
    assert commit is not None
    assert f"commit {commit[1]}" in readme


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000


def test_the_files_that_the_design_names_exist() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    assert len(named) > 20
    places = (ROOT / "fomoe_flwr", ROOT)
    assert sorted(path for path in named if not any((at / path).exists() for at in places)) == []


def test_the_design_lists_every_room() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    text = text.partition("## The rooms")[2].partition("\n## ")[0]
    rooms = {path.parent.name for path in (ROOT / "fomoe_flwr").glob("*/__init__.py")}
    listed = {
        name
        for cell in re.findall(r"^\| \d+ \| ([^|]+) \|", text, flags=re.MULTILINE)
        for name in re.findall(r"`(\w+)`", cell)
    }
    assert listed == rooms | {"files", "errors", "events"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_page_is_in_the_sites_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```{toctree}\n(.*?)```", index, flags=re.DOTALL)
    listed = [line for block in blocks for line in block.split() if not line.startswith(":")]
    for page in (ROOT / "docs").glob("*.md"):
        if page.stem != "index":
            assert any(fnmatch(page.stem, pattern) for pattern in listed), page.name


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-E", "-b", "html"]
    command += [str(ROOT / "docs"), str(tmp_path / "site")]
    built = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "site" / "algorithm.html").read_text(encoding="utf-8")
    # Mathematics is in the page itself, and nothing is fetched from elsewhere.
    assert page.count("<math") > 15
    assert re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="https?://', page) == []
    reference = (tmp_path / "site" / "reference" / "config.html").read_text(encoding="utf-8")
    assert "fomoe_flwr.config.schema.LayoutSettings" in reference


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_in_blocks_that_are_tested(page: Path) -> None:
    typed = re.compile(r"^\s*\$?\s*(fomoe|flwr|make|pip|python) ", re.MULTILINE)
    for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if found["language"] in ("", "text"):
            assert typed.search(found["body"]) is None, f"mark as bash: {found['body'][:60]}"
