"""The compose file, its Dockerfile and .dockerignore, held against the package."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.common.config import parse_config_args

from fomoe_flwr.cli.main import command_parser
from fomoe_flwr.federation.warm.folder import MOST_FOLDER_BYTES

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "compose"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
NODES = [name for name in SERVICES if name.startswith("supernode-")]
DAEMONS = ["superlink", "superexec", *NODES]
SECRETS = {
    "superlink": {"ca.crt", "server.crt", "server.key", "superexec.secret"},
    "superexec": {"ca.crt", "superexec.secret"},
    "register": {"ca.crt", "node-0.pub", "node-1.pub"},
    "submit": {"ca.crt"},
    "setup": set(),
    "supernode-0": {"ca.crt", "node-0"},
    "supernode-1": {"ca.crt", "node-1"},
}


def expanded(text: str, **values: str) -> str:
    """Put in the variables, as compose does."""
    text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: values.get(found[1], "") or found[2], text)
    return text.replace("$$", "$")


def node_config(name: str, **values: str) -> dict[str, Any]:
    words = shlex.split(expanded(SERVICES[name]["command"], **values))
    return dict(parse_config_args([words[words.index("--node-config") + 1]]))


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    # It gives the credentials to the user as which all others run.
    assert ("user" in service, "cap_add" in service) == (name == "setup",) * 2
    assert "--insecure" not in str(service)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_sees_only_its_own_credentials(name: str) -> None:
    service = SERVICES[name]
    used = set(re.findall(r"/run/secrets/([\w.-]+\w)", str(service.get("command", ""))))
    assert set(service.get("secrets", [])) == SECRETS[name] >= used - {"node"}
    assert SECRETS[name] <= set(COMPOSE["secrets"])
    if name != "setup":
        assert "credentials" not in str(service.get("volumes"))


@pytest.mark.parametrize("name", DAEMONS)
def test_a_daemon_starts_again_and_is_checked(name: str) -> None:
    service = SERVICES[name]
    assert service["restart"] == "always"
    kind, python, option, program = service["healthcheck"]["test"]
    assert (kind, python, option) == ("CMD", "python", "-c")
    compile(program, name, "exec")
    assert "127.0.0.1" in program or "localhost" in program


@pytest.mark.parametrize("name", DAEMONS)
def test_a_daemon_has_options_that_its_program_knows(name: str) -> None:
    words = shlex.split(expanded(SERVICES[name]["command"]))
    tool = Path(sys.executable).parent / words[0]
    shown = subprocess.run([tool, "--help"], capture_output=True, text=True, check=True).stdout
    assert {w for w in words if w.startswith("--")} <= set(re.findall(r"--[\w-]+", shown))


@pytest.mark.parametrize("name", NODES)
def test_a_node_trains_on_its_share_unless_it_is_given_text(name: str) -> None:
    number = name[-1]
    config = node_config(name)
    assert config["partition-id"] == int(number)
    assert "data-path" not in config
    assert len(config["worker-dir"]) <= MOST_FOLDER_BYTES
    words = {f"NODE_{number}": 'data-path="/data" capacity-gib=0.5'}
    assert node_config(name, **words) == config | {"data-path": "/data", "capacity-gib": 0.5}
    assert expanded(SERVICES[name]["volumes"][1]).split(":")[1:] == ["/data", "ro"]


def test_nodes_differ_in_nothing_but_their_number() -> None:
    numbered = r"(node-|NODE_|DATA_|partition-id=)\d"
    first, second = (re.sub(numbered, r"\1N", str(SERVICES[name])) for name in NODES)
    assert first == second


def test_setup_and_submit_say_what_the_command_line_takes() -> None:
    script = expanded(SERVICES["setup"]["command"][-1], LINK_NAME="link.example.org")
    commands = [shlex.split(line)[1:] for line in script.splitlines() if line.startswith("fomoe")]
    commands.append([*SERVICES["submit"]["entrypoint"][1:], "preset=tiny"])
    for words in commands:
        assert command_parser().parse_args(words).run, words
    made = {"ca.crt", "server.crt", "server.key", "superexec.secret"}
    for name in [words[3] for words in commands if "node-key" in words]:
        made |= {name, f"{name}.pub"}
    assert made == set(COMPOSE["secrets"])


def test_a_submission_finds_the_superlink_by_a_name_of_its_certificate() -> None:
    from fomoe_flwr.federation.deployment.credentials import LOCAL_NAMES
    from fomoe_flwr.federation.deployment.loopback import CONNECTION

    config = tomllib.loads((FOLDER / "config.toml").read_text(encoding="utf-8"))["superlink"]
    host, port = config[CONNECTION]["address"].split(":")
    assert config["default"] == CONNECTION
    assert host in SERVICES
    assert host in LOCAL_NAMES
    assert expanded(SERVICES["superlink"]["ports"][0]).split(":")[1] == port


def ignored(path: str) -> bool:
    """Whether the build leaves a path out: the last pattern that matches decides."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    out = False
    for line in lines:
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        shape = re.escape(pattern).replace(r"\*\*/", "(.*/)?").replace(r"\*", "[^/]*")
        if re.match(f"{shape}(/|$)", path):
            out = not line.startswith("!")
    return out


@pytest.mark.parametrize(
    "path",
    [
        ".git/config",
        "outputs/run/config.yaml",
        "docs/deploy.md",
        "tests/conftest.py",
        "federation/credentials/ca.key",
        "deploy/compose/credentials/ca.key",
        "deploy/compose/data/text.txt",
        "deploy/compose/.env",
        "fomoe_flwr/__pycache__/a.pyc",
        "fomoe_flwr/cli/__pycache__/a.pyc",
    ],
)
def test_what_the_image_does_not_need_stays_out(path: str) -> None:
    assert ignored(path)


def test_what_the_package_is_made_of_goes_in() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    hatch = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*hatch["packages"], *hatch["force-include"], project["project"]["readme"]}
    needed |= {*project["project"]["license-files"], "server_app.py", "client_app.py"}
    needed |= {"pyproject.toml", "constraints.txt", "deploy/compose/config.toml"}
    assert [path for path in sorted(needed) if ignored(path) or not (ROOT / path).exists()] == []


def test_the_image_runs_as_a_user_of_its_own() -> None:
    text = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
    users = re.findall(r"^USER (\w+)$", text, re.MULTILINE)
    assert users == ["fomoe"]
    assert "--uid 10001 fomoe" in text
    assert "10001:10001" in SERVICES["setup"]["command"][-1]


def test_the_page_names_services_and_variables_that_exist() -> None:
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    section = page.partition("## With compose")[2].partition("\n## ")[0]
    profiles = {name for service in SERVICES.values() for name in service["profiles"]}
    assert set(re.findall(r"--profile (\w+)", section)) == profiles
    assert set(re.findall(r"run --rm (\w+)", section)) == {"setup", "register", "submit"}
    variables = set(re.findall(r"\$\{(\w+)", str(SERVICES)))
    told = set(re.findall(r"\b[A-Z]+(?:_[A-Z0-9]+)?\b", section))
    assert variables <= told
