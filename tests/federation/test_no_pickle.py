"""No module of the package can unpickle, so nothing from the network is unpickled."""

from __future__ import annotations

import ast
from pathlib import Path

import fomoe_flwr


def test_no_module_of_the_package_can_unpickle() -> None:
    unpicklers = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    sources = list(Path(fomoe_flwr.__file__).parent.rglob("*.py"))
    assert len(sources) > 30
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.partition(".")[0] for name in names} & unpicklers, source
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "torch.save", "eval", "exec"), source
                for keyword in node.keywords:
                    if keyword.arg == "allow_pickle":
                        assert ast.unparse(keyword.value) == "False", source
