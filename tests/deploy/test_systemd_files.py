"""The units and their example files, held against the package, systemd and docs/deploy.md."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from flwr.common.config import parse_config_args
from systemd_machine import HOST, blocks

from fomoe_flwr.cli.main import command_parser
from fomoe_flwr.config import expand_files, load_settings
from fomoe_flwr.federation.deployment.loopback import CONNECTION
from fomoe_flwr.federation.warm.folder import MOST_FOLDER_BYTES

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "systemd"
COMMON = FOLDER / "fomoe-.service.d" / "common.conf"
UNITS = sorted(path.name for path in FOLDER.glob("*.service"))
ENABLED = [name for name in UNITS if name != "fomoe-worker@.service"]
SECRETS = {
    "fomoe-superlink.service": {"ca.crt", "server.crt", "server.key", "superexec.secret"},
    "fomoe-superexec.service": {"ca.crt", "superexec.secret"},
    "fomoe-supernode@.service": {"ca.crt", "key"},
    "fomoe-worker@.service": set(),
    "fomoe-run@.service": set(),
}
MOST_EXPOSED = 1.5


def entries(path: Path, key: str) -> list[str]:
    """Return the values of a key, in order; a line may go on in the next."""
    text = path.read_text(encoding="utf-8").replace("\\\n", "")
    return re.findall(rf"^{key}=(.*)$", text, re.MULTILINE)


def command(name: str, **variables: str) -> list[str]:
    """Return a unit's command for the instance `berlin`."""
    (line,) = entries(FOLDER / name, "ExecStart")
    line = line.replace("%i", "berlin").replace("%d", "/run/credentials")
    words = shlex.split(line)
    return [re.sub(r"\$\{(\w+)\}", lambda found: variables[found[1]], word) for word in words]


def variables(path: Path) -> dict[str, str]:
    """Read a file as systemd's EnvironmentFile."""
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line.split("=", 1) for line in lines if line and not line.startswith("#")]
    return {key: "".join(shlex.split(value)) for key, value in pairs}


def node_command() -> list[str]:
    return command("fomoe-supernode@.service", **variables(FOLDER / "node.env"))


def node_config() -> dict[str, Any]:
    words = node_command()
    return dict(parse_config_args([words[words.index("--node-config") + 1]]))


def test_there_is_a_unit_for_each_part() -> None:
    assert set(UNITS) == set(SECRETS)


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_has_options_that_its_program_knows(name: str) -> None:
    words = command(name, **variables(FOLDER / "node.env"))
    assert words[0].startswith("/opt/fomoe/bin/")
    assert "--insecure" not in words
    tool = Path(sys.executable).parent / Path(words[0]).name
    if tool.name == "fomoe":
        # As the command itself does: overrides come before and after options.
        options, rest = command_parser().parse_known_args(words[1:])
        assert options.run
        assert [word for word in rest if word.startswith("-")] == []
        return
    shown = subprocess.run([tool, "--help"], capture_output=True, text=True, check=True).stdout
    assert {w for w in words if w.startswith("--")} <= set(re.findall(r"--[\w-]+", shown))


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_is_given_the_credentials_that_it_names_and_no_more(name: str) -> None:
    given = dict(entry.split(":") for entry in entries(FOLDER / name, "LoadCredential"))
    assert set(given) == SECRETS[name]
    assert set(re.findall(r"%d/([\w.]+)", (FOLDER / name).read_text(encoding="utf-8"))) == set(
        given
    )
    assert all(Path(path).parent == Path("/etc/fomoe") for path in given.values())


@pytest.mark.parametrize("name", UNITS)
def test_no_unit_takes_back_what_all_have(name: str) -> None:
    of_all = set(re.findall(r"^(\w+)=", COMMON.read_text(encoding="utf-8"), re.MULTILINE))
    own = set(re.findall(r"^(\w+)=", (FOLDER / name).read_text(encoding="utf-8"), re.MULTILINE))
    # What a node says comes on top of what the host says.
    assert own & of_all <= {"EnvironmentFile"}
    assert {"User", "PrivateTmp", "ProtectSystem", "StateDirectory", "CacheDirectory"} <= of_all


@pytest.mark.parametrize("name", ENABLED)
def test_what_is_enabled_is_back_after_a_reboot(name: str) -> None:
    assert entries(FOLDER / name, "WantedBy") == ["multi-user.target"]


@pytest.mark.parametrize("name", [name for name in UNITS if name != "fomoe-run@.service"])
def test_what_stays_up_is_started_again_for_ever(name: str) -> None:
    assert entries(FOLDER / name, "Restart") == ["always"]
    assert entries(FOLDER / name, "StartLimitIntervalSec") == ["0"]


def test_a_node_and_its_worker_meet_in_one_folder() -> None:
    config = node_config()
    assert config["worker-dir"] == command("fomoe-worker@.service")[2]
    assert len(config["worker-dir"]) <= MOST_FOLDER_BYTES
    assert (config["worker-start"], config["partition-id"]) == (False, 0)
    assert "fomoe-worker@%i.service" in entries(FOLDER / "fomoe-supernode@.service", "Wants")[0]


def test_all_that_is_written_is_below_the_folders_that_systemd_makes() -> None:
    (state,), (cache,) = entries(COMMON, "StateDirectory"), entries(COMMON, "CacheDirectory")
    state, cache = f"/var/lib/{state}", f"/var/cache/{cache}"
    host = variables(ROOT / "deploy" / "environment")
    assert host["XDG_CACHE_HOME"] == cache
    assert host["FLWR_HOME"] == f"{state}/flower"
    config = node_config()
    superlink = command("fomoe-superlink.service")
    written = [
        *(config["worker-dir"], config["state-dir"], *entries(COMMON, "WorkingDirectory")),
        superlink[superlink.index("--database") + 1],
        command("fomoe-run@.service")[-1].removeprefix("output_dir="),
    ]
    assert [path for path in written if not f"{path}/".startswith(f"{state}/")] == []
    # Where `federation submit` looks for Flower's configuration.
    assert command("fomoe-run@.service")[3] == state


def test_the_examples_are_of_one_federation() -> None:
    config = tomllib.loads((FOLDER / "config.toml").read_text(encoding="utf-8"))["superlink"]
    link = command("fomoe-superlink.service")
    port = link[link.index("--port") + 1]
    assert config["default"] == CONNECTION
    assert config[CONNECTION]["address"] == f"localhost:{port}"
    assert config[CONNECTION]["root-certificates"] == "/etc/fomoe/ca.crt"
    assert f"localhost:{port}" in command("fomoe-superexec.service")
    assert node_command()[node_command().index("--superlink") + 1] == f"{HOST}:{port}"


def test_the_example_of_a_run_has_settings() -> None:
    settings = load_settings(expand_files([str(FOLDER / "run.yaml")]))
    assert settings.layout.num_workers == 2


def test_a_gpu_is_let_through_by_what_all_lack() -> None:
    assert entries(FOLDER / "gpu.conf", "PrivateDevices") == ["false"]
    assert entries(COMMON, "PrivateDevices") == ["true"]
    assert entries(FOLDER / "gpu.conf", "DeviceAllow") == ["char-nvidia* rw"]


def test_the_page_installs_every_file_and_starts_every_unit() -> None:
    assert list(blocks()) == ["Install", "Server", "Node", "Run"]
    text = "".join(blocks().values())
    started = set(re.findall(r"fomoe-\w+@?", " ".join(re.findall(r"enable --now (.*)", text))))
    assert started == {name.removesuffix(".service") for name in ENABLED}
    for path in re.findall(r"deploy/\S+", text):
        assert list(ROOT.glob(path)), path
    for name in ("config.toml", "node.env", "run.yaml"):
        assert f"deploy/systemd/{name}" in text
    assert "deploy/systemd/fomoe-* /etc/systemd/system/" in text
    (home,) = re.findall(r"FLWR_HOME=(\S+)", text)
    assert home == variables(ROOT / "deploy" / "environment")["FLWR_HOME"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
@pytest.mark.parametrize("name", UNITS)
def test_systemd_finds_a_unit_little_exposed(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "etc" / "systemd" / "system"
    shutil.copytree(FOLDER, folder)
    words = ["systemd-analyze", "security", "--offline=true", f"--root={tmp_path}"]
    unit = name.replace("@.", "@berlin.")
    done = subprocess.run([*words, unit], capture_output=True, text=True, check=True)
    found = re.search(r"exposure level for .*: ([\d.]+)", done.stdout)
    assert found, done.stdout
    assert float(found[1]) <= MOST_EXPOSED
