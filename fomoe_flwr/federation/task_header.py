"""The task header: the text that goes with the arrays of a task, and its checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from fomoe_flwr.config import Settings
from fomoe_flwr.federation.wire import TASK, WireError, are_counts, is_count, json_in, json_record
from fomoe_flwr.parameters.fragments import MOMENTS
from fomoe_flwr.parameters.shapes import num_sparse_layers


@dataclass(frozen=True)
class TaskHeader:
    """What a task says besides its arrays: which run, which round, which worker, which experts."""

    settings: Mapping[str, Any]
    spec_digest: str
    tokenizer_digest: str
    run_key: str
    worker: int
    server_round: int
    layout_digest: str
    residents: Sequence[Sequence[int]]
    keep_rounds: Sequence[int]
    fragment: int
    """The fragment that the arrays carry; -1 stands for the worker's whole slice."""
    moments: Sequence[str]
    """Names of the averaged moments whose arrays come along."""
    pooled_share: Sequence[Sequence[float]] | None
    """[num_layers][num_experts] share of each expert in the assignments of the round before. None
    where the balance loss does not need it."""
    probe: Sequence[Sequence[int]]
    """[windows][tokens] ids. The reply says which experts are chosen for them; may be empty."""
    continues: bool
    """Whether this worker's reply of the round before counted: it goes on from there."""
    steps: int
    """Steps to take; 0 means those that the settings give all workers."""

    def record(self) -> ConfigRecord:
        """Pack into a record."""
        return json_record(self.__dict__)

    @classmethod
    def read(cls, content: RecordDict) -> TaskHeader:
        """Unpack and check types. Raises WireError."""
        fields = json_in(content, TASK)
        try:
            header = cls(**fields)
        except TypeError as error:
            raise WireError(f"task header is malformed: {error}") from error
        for name in ("spec_digest", "tokenizer_digest", "run_key", "layout_digest"):
            _expect(name, isinstance(fields[name], str), "a string")
        for name in ("worker", "server_round", "steps"):
            _expect(name, is_count(fields[name]), "an integer >= 0")
        _expect("settings", isinstance(header.settings, dict), "an object")
        _expect("keep_rounds", are_counts(header.keep_rounds), "a list of integers >= 0")
        residents = header.residents
        _expect(
            "residents",
            isinstance(residents, list) and all(are_counts(layer) for layer in residents),
            "a list of lists of integers >= 0",
        )
        _expect("fragment", type(header.fragment) is int and header.fragment >= -1, "-1 or more")
        known = isinstance(header.moments, list) and set(map(str, header.moments)) <= set(MOMENTS)
        _expect("moments", known, f"a list of {', '.join(MOMENTS)}")
        _expect(
            "pooled_share",
            _are_shares(header.pooled_share),
            "null or a table of numbers from 0 to 1",
        )
        _expect(
            "probe",
            isinstance(header.probe, list)
            and all(are_counts(window) and len(window) > 0 for window in header.probe)
            and len(set(map(len, header.probe))) <= 1,
            "a table of integers >= 0",
        )
        _expect("continues", isinstance(header.continues, bool), "true or false")
        return cls(**{**fields, "residents": tuple(tuple(layer) for layer in residents)})

    def check_ranges(self, settings: Settings) -> None:
        """Raise WireError where a worker, layer, expert, fragment or token is not in the run."""
        model, workers = settings.model, settings.layout.num_workers
        if self.worker >= workers:
            raise WireError(f"task is for worker {self.worker}, layout.num_workers={workers}")
        known = range(model.num_experts)
        layers = num_sparse_layers(model)
        if len(self.residents) != layers or any(
            list(held) != sorted(set(held) & set(known)) for held in self.residents
        ):
            raise WireError(
                f"residents must be {layers} rising lists of expert ids from 0 to "
                f"{model.num_experts - 1}"
            )
        if self.continues and self.server_round < 2:
            raise WireError(f"task of round {self.server_round} continues a round before the first")
        if self.fragment >= settings.outer.fragments:
            raise WireError(
                f"task carries fragment {self.fragment}, outer.fragments={settings.outer.fragments}"
            )
        shares = self.pooled_share
        if shares is not None and [len(row) for row in shares] != [model.num_experts] * layers:
            raise WireError(f"pooled_share must be {layers} lists of {model.num_experts} shares")
        unknown = max(map(max, self.probe), default=0)
        if unknown >= model.vocab_size:
            raise WireError(f"probe has token {unknown}, the vocabulary {model.vocab_size}")


def _are_shares(value: Any) -> bool:
    return value is None or (
        isinstance(value, list)
        and all(
            isinstance(row, list)
            and all(isinstance(item, int | float) and 0 <= item <= 1 for item in row)
            for row in value
        )
    )


def _expect(name: str, is_right: bool, wanted: str) -> None:
    if not is_right:
        raise WireError(f"task header is malformed: {name} must be {wanted}")
