"""A warm worker's folder: its owner's alone, with one worker at most."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from warm_post import ROOT, Post, assert_same, some_content

from fomoe_flwr.errors import InputError
from fomoe_flwr.federation.warm.folder import Folder
from fomoe_flwr.federation.warm.handover import hand_over


def test_the_token_and_the_folder_are_for_their_owner_only(post: Post) -> None:
    post.start()
    folder = post.folder
    for path, mode in ((folder.path, 0o700), (folder.token, 0o600), (folder.socket, 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode, path
    folder.path.chmod(0o750)
    with pytest.raises(InputError, match="mode 0700"):
        hand_over("echo", some_content(), post.context())
    with pytest.raises(InputError, match="mode 0700"):
        hand_over("echo", some_content(), post.context(**{"worker-start": True}))


@pytest.mark.parametrize(
    ("path", "reason"),
    [("relative/path", "absolute"), ("/tmp/" + "x" * 100, "too long for a socket")],
)
def test_a_folder_that_cannot_serve_is_refused(path: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Folder(path)


def test_a_folder_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(InputError, match="must be a folder"):
        Folder(tmp_path / "link").create()


def test_a_folder_has_one_worker(post: Post) -> None:
    first = post.start()
    command = [sys.executable, "-m", "fomoe_flwr.cli", "worker", str(post.folder.path)]
    second = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert second.returncode == 2
    assert second.stderr.startswith("error: a warm worker lives in")
    assert len(second.stderr.splitlines()) == 1
    assert_same(hand_over("echo", some_content(), post.context()), some_content())
    assert first.poll() is None
