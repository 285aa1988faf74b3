"""The walls of the house: which room may import what, read from the source.

An import inside a function counts like any other, and so does one for type checkers. What stands in
a string (`python -m MODULE`) is no import.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from fomoe_flwr.config import load_settings

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fomoe_flwr"
APPS = ("server_app", "client_app")

FLOORS = (
    ("cli",),
    ("sweep", *APPS),
    ("federation",),
    ("report",),
    ("run",),
    ("worker", "aggregation", "plan"),
    ("parallel", "model", "costs"),
    ("data", "parameters", "layout"),
    ("config",),
    ("codecs", "files", "events"),
    ("errors",),
)
"""Rooms from the top of the house to its bottom: a room imports from lower floors only."""

UPWARD = {("fomoe_flwr.sweep.__main__", "fomoe_flwr.cli.main")}
"""`python -m fomoe_flwr.sweep` is another name of a command."""

TORCH_FREE = ("config", "parameters", "layout", "costs", "plan")
HEAVY = {"torch", "transformers", "datasets", "safetensors", "flwr", "ray", "matplotlib", "pyarrow"}
"""What takes long to import, besides numpy."""

UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MOST_LINES = 400


@dataclass(frozen=True)
class Import:
    """One import of one module."""

    source: str
    target: str
    """A module of ours, or the name of a foreign one."""
    place: str

    @property
    def package(self) -> str:
        return self.target.partition(".")[0]


@cache
def modules() -> dict[str, Path]:
    """Return all modules of the package and the two apps, by name."""
    found = {name: ROOT / f"{name}.py" for name in APPS}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def room(module: str) -> str:
    """Return the room of a module of ours; empty for the package itself."""
    return module if module in APPS else [*module.split("."), ""][1]


@cache
def imports() -> tuple[Import, ...]:
    return tuple(each for name, path in modules().items() for each in _imports(name, path))


def _imports(source: str, path: Path) -> Iterator[Import]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = node.module or ""
            if node.level:
                package = source.split(".")[: None if path.stem == "__init__" else -1]
                package = package[: len(package) - node.level + 1]
                parent = ".".join([*package, *filter(None, [parent])])
            # `from room import module` names the module, `from module import name` does not.
            names = [f"{parent}.{alias.name}" for alias in node.names]
            targets = [name if name in modules() else parent for name in names]
        else:
            continue
        place = f"{path.relative_to(ROOT)}:{node.lineno}"
        yield from (Import(source, target, place) for target in dict.fromkeys(targets))


def ours(each: Import) -> bool:
    return each.target in modules()


def refuse(wrong: Iterable[str]) -> None:
    lines = sorted(wrong)
    assert not lines, "\n" + "\n".join(lines)


def test_the_table_of_floors_has_every_room_once() -> None:
    rooms = [name for floor in FLOORS for name in floor]
    assert sorted(rooms) == sorted({room(name) for name in modules()} - {""})


def test_a_room_imports_from_lower_floors_only() -> None:
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    refuse(
        f"{each.place} must not import {each.target}: {room(each.target)} is not below "
        f"{room(each.source)}"
        for each in imports()
        if ours(each)
        and room(each.source) != room(each.target)
        and room(each.target)
        and (each.source, each.target) not in UPWARD
        and (not room(each.source) or floor[room(each.target)] <= floor[room(each.source)])
    )


def test_no_module_imports_itself_by_way_of_others() -> None:
    targets: dict[str, list[str]] = {name: [] for name in modules()}
    for each in imports():
        if ours(each) and each.source != each.target:
            targets[each.source].append(each.target)
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            pytest.fail("a circle: " + " -> ".join([*path[path.index(module) :], module]))
        if module not in done:
            for target in targets[module]:
                walk(target, (*path, module))
            done.add(module)

    for name in modules():
        walk(name, ())


def test_flower_is_spoken_in_one_room() -> None:
    refuse(
        f"{each.place} must not import {each.target}: only federation/ and the two apps speak to "
        "Flower"
        for each in imports()
        if each.package == "flwr" and room(each.source) not in ("federation", *APPS)
    )


def test_rooms_without_tensors_import_no_torch() -> None:
    refuse(
        f"{each.place} must not import {each.target}: {room(each.source)} is free of torch"
        for each in imports()
        if each.package in HEAVY | {"numpy"}
        and room(each.source) in (*TORCH_FREE, "files", "errors")
    )


def loaded_by(code: str) -> set[str]:
    """Return the packages that a new Python process has loaded after running some code."""
    tail = "\nprint(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", f"import sys\n{code}{tail}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_rooms_without_tensors_load_nothing_heavy() -> None:
    names = [name for name in modules() if room(name) in TORCH_FREE]
    names += ["fomoe_flwr.files", "fomoe_flwr.run.directory", "fomoe_flwr.run.status"]
    # One process for all; one for each would take a minute.
    found = loaded_by("\n".join(f"import {name}" for name in names))
    heavy = found & (HEAVY | {"numpy"})
    assert not heavy, f"{', '.join(TORCH_FREE)}, run.directory or run.status load {heavy}"


def test_the_client_app_loads_nothing_heavy() -> None:
    heavy = loaded_by("import client_app") & (HEAVY - {"flwr"} | {"hydra"})
    assert not heavy, f"client_app.py must not load {heavy}: Flower starts it for every message"


SITE = "sites: [{memory_gib: 80, teraflops: 400, up_mbps: 1000, down_mbps: 1000}]\n"


@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "report --help",
        "status RUN",
        "costs --explain model=paper-2b",
        "costs --json",
        "plan SITES model=paper-2b",
    ],
)
def test_commands_that_train_nothing_load_nothing_heavy(command: str, tmp_path: Path) -> None:
    (tmp_path / "sites.yaml").write_text(SITE, encoding="utf-8")
    load_settings([]).save(tmp_path / "config.yaml")
    places = {"RUN": str(tmp_path), "SITES": str(tmp_path / "sites.yaml")}
    words = [places.get(word, word) for word in command.split()]
    code = (
        "from fomoe_flwr.cli.main import main\n"
        f"try: status = main({words!r})\n"
        "except SystemExit as ended: status = ended.code\n"
        "assert status == 0"
    )
    heavy = loaded_by(code) & (HEAVY | {"numpy"})
    assert not heavy, f"fomoe {command} must not load {heavy}"


def test_no_module_stands_outside_the_rooms() -> None:
    loose = {path.stem for path in PACKAGE.glob("*.py")}
    assert loose == {"__init__", "errors", "events", "files"}, "put the new module into a room"


def test_no_file_is_too_long() -> None:
    folders = (PACKAGE, ROOT / "tests", ROOT / "benchmarks", ROOT / "scripts")
    lengths = {
        path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines())
        for folder in folders
        for path in folder.rglob("*.py")
    }
    refuse(
        f"{path} has {length} lines, {MOST_LINES} are allowed: it is two things"
        for path, length in lengths.items()
        if length > MOST_LINES
    )


def test_a_module_is_named_after_what_it_is() -> None:
    vague = {"util", "utils", "common", "helper", "helpers", "misc", "tools"}
    paths = (*PACKAGE.rglob("*"), *(ROOT / "tests").rglob("*.py"))
    refuse(f"{path.relative_to(ROOT)} says nothing" for path in paths if path.stem in vague)


def test_nothing_is_unpickled() -> None:
    wrong = [
        f"{each.place} must not import {each.target}: it can unpickle"
        for each in imports()
        if each.package in UNPICKLERS
    ]
    for path in modules().values():
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Call):
                continue
            place, called = f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func)
            if called in ("torch.load", "torch.save"):
                wrong.append(f"{place} must not call {called}: it pickles")
            wrong += [
                f"{place} must not allow pickles"
                for keyword in node.keywords
                if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False"
            ]
    refuse(wrong)


def test_one_module_knows_from_a_key_what_is_shared() -> None:
    wrong = []
    for name, path in modules().items():
        if name == "fomoe_flwr.parameters.keys":
            continue
        for node in ast.walk(tree(path)):
            place = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.FunctionDef) and node.name == "is_expert_key":
                wrong.append(f"{place} must not define is_expert_key: parameters/keys does")
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("re."):
                pattern = ast.unparse(node)
                if any(word in pattern for word in ("experts", "gate", "router", "layers")):
                    wrong.append(f"{place} must not match {pattern}: ask parameters/keys")
    refuse(wrong)
