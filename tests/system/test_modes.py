"""Every outer mode through the real strategy, wire and workers, against what it must equal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from federated import (
    Federation,
    Weights,
    assert_identical,
    micro,
    use_made_up_data,
    use_no_training,
)
from safetensors.torch import load_file
from test_equivalence import stock, stock_adamw
from torch import Tensor, nn

from fomoe_flwr import costs
from fomoe_flwr.cli.main import main
from fomoe_flwr.config import Settings, SettingsError, load_settings
from fomoe_flwr.federation import client
from fomoe_flwr.federation.round_record import RoundRecord
from fomoe_flwr.layout import Layout
from fomoe_flwr.parameters.fragments import MOMENTS
from fomoe_flwr.report import live
from fomoe_flwr.run.directory import RunDirectory
from fomoe_flwr.worker import round as worker
from fomoe_flwr.worker.training import learning_rate

WORKERS, LAYERS = 3, 2
OUTER = {
    "average": ["outer=average"],
    "nesterov": ["outer=nesterov"],
    "local_adamw": ["outer=local_adamw"],
    "des_loc": ["outer=des_loc", "outer.first_moment_every=2", "outer.second_moment_every=3"],
}
EVERYWHERE = ["layout.overlap=3"]


@pytest.fixture(autouse=True)
def _made_up_data(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    # Runs through the command line have text of their own.
    if "words" not in request.fixturenames:
        use_made_up_data(monkeypatch)


@pytest.fixture
def federate(tmp_path: Path) -> Callable[..., Federation]:
    """Return a function that runs a micro federation in a folder of its own."""
    count = iter(range(100))

    def run(*overrides: str) -> Federation:
        return Federation(micro(*overrides), tmp_path / str(next(count))).run()

    return run


Federate = Callable[..., Federation]


def failures(federation: Federation) -> dict[int, dict[int, str]]:
    return {
        s.record.server_round: s.record.failures for s in federation.rounds if s.record.failures
    }


# --- equivalences ---------------------------------------------------------------------------------


def slices(key: str, value: Tensor, fragment: int, fragments: int) -> Tensor:
    """View the part of a full key that a fragment carries, by its definition."""
    if ".layers." in key:
        mine = int(key.split(".")[2]) % fragments == fragment
        return value if mine else value[:0]
    rows = len(value)
    return value[rows * fragment // fragments : rows * (fragment + 1) // fragments]


def full_replicas(settings: Settings, initial: Weights) -> Weights:
    """Every outer mode by its definition, on full replicas of stock transformers and torch models.

    A worker goes on from its own weights where a fragment was not synchronised; the server's are
    those of the last synchronisation.
    """
    local, outer = settings.local, settings.outer
    fragments, total = outer.fragments, settings.rounds * local.steps
    globally = {key: value.clone() for key, value in initial.items()}
    models = [stock(settings.model, initial) for _ in range(WORKERS)]
    adams = [stock_adamw(model, local) for model in models]
    texts = [client._node_data(settings, i, "", None).batches(0) for i in range(WORKERS)]  # type: ignore[arg-type]
    pieces = {
        (key, f): nn.Parameter(slices(key, value, f, fragments))
        for key, value in globally.items()
        for f in range(fragments)
        if len(slices(key, value, f, fragments))
    }
    momentum = outer.momentum if outer.name == "nesterov" else 0.0
    steps = {
        place: torch.optim.SGD([piece], lr=outer.lr, momentum=momentum, nesterov=momentum > 0)
        for place, piece in pieces.items()
    }
    turns = dict.fromkeys(range(fragments), 0)
    for server_round in range(settings.rounds):
        for model, adam, text in zip(models, adams, texts, strict=True):
            for step in range(local.steps):
                for group in adam.param_groups:
                    group["lr"] = learning_rate(local, server_round * local.steps + step, total)
                adam.zero_grad()
                stock_loss_here(model, text.next_batch(), settings).backward()
                nn.utils.clip_grad_norm_(model.parameters(), local.grad_clip)
                adam.step()
        fragment = server_round % fragments
        turns[fragment] += 1
        replicas = [dict(model.named_parameters()) for model in models]
        with torch.no_grad():
            for (key, f), piece in pieces.items():
                if f != fragment:
                    continue
                copies = [slices(key, own[key], f, fragments) for own in replicas]
                piece.grad = piece - torch.stack(copies).mean(0)
                steps[key, f].step()
                for own in copies:
                    own.copy_(piece)
                due = {
                    "exp_avg": turns[f] % outer.first_moment_every == 0,
                    "exp_avg_sq": turns[f] % outer.second_moment_every == 0,
                }
                for moment in MOMENTS:
                    if outer.name == "local_adamw" or (outer.name == "des_loc" and due[moment]):
                        values = [
                            slices(key, adam.state[own[key]][moment], f, fragments)
                            for adam, own in zip(adams, replicas, strict=True)
                        ]
                        mean = torch.stack(values).mean(0)
                        for value in values:
                            value.copy_(mean)
    return globally


def stock_loss_here(model: Any, windows: Tensor, settings: Settings) -> Tensor:
    """Return the stock loss with the Switch loss of this model's size."""
    out = model(input_ids=windows[:, :-1], use_cache=False, output_router_logits=True)
    loss = nn.functional.cross_entropy(out.logits.flatten(0, 1), windows[:, 1:].flatten())
    experts, top_k = settings.model.num_experts, settings.model.top_k
    for logits in out.router_logits:
        probability = logits.softmax(-1)
        chosen = nn.functional.one_hot(probability.topk(top_k).indices, experts).sum(1).float()
        share = chosen.mean(0) / top_k
        balance = experts * (share * probability.mean(0)).sum() / LAYERS
        loss = loss + settings.balance.loss * balance
    return loss


@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("outer", OUTER)
def test_with_full_overlap_every_outer_mode_is_its_full_replica_method(
    outer: str, fragments: int, federate: Federate
) -> None:
    federation = federate(
        *OUTER[outer],
        *EVERYWHERE,
        f"outer.fragments={fragments}",
        "rounds=7",
        "local.weight_decay=0.1",
    )
    assert failures(federation) == {}
    expected = full_replicas(federation.settings, federation.initial)
    for key, value in expected.items():
        assert (value - federation.initial[key]).abs().max() > 1e-3, key
        torch.testing.assert_close(
            federation.state[key], value, rtol=0, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("outer", OUTER)
def test_full_overlap_is_the_full_replica_experiment_bit_by_bit(
    outer: str, federate: Federate
) -> None:
    partial = federate("experiment=fomoe", *OUTER[outer], *EVERYWHERE, "layout.kind=random")
    for experiment in ("photon", "diloco"):
        whole = federate(f"experiment={experiment}", *OUTER[outer], *EVERYWHERE)
        assert_identical(whole.state, partial.state)
        assert whole.traffic == partial.traffic


def test_the_outer_modes_differ(federate: Federate) -> None:
    ends = [federate(*words, "rounds=3").state["model.norm.weight"] for words in OUTER.values()]
    assert len({tuple(end.tolist()) for end in ends}) == len(OUTER)


def test_one_fragment_is_no_fragments(federate: Federate) -> None:
    for outer in ("nesterov", "local_adamw"):
        one = federate(*OUTER[outer], "outer.fragments=1", "rounds=3")
        none = federate(*OUTER[outer], "rounds=3")
        assert_identical(one.state, none.state)
        assert_identical(one.outer.tensors(), none.outer.tensors())
        assert one.traffic == none.traffic
        (last, *_) = sorted(one.folder.rglob("round-000003.safetensors"))
        # Nothing is kept on a worker's disk that only fragments need.
        assert not [name for name in load_file(last) if name.startswith("weights/")]


@pytest.mark.parametrize("fragments", [1, 2])
@pytest.mark.parametrize("kind", ["fixed", "random"])
def test_des_loc_with_both_periods_one_is_local_adamw(
    kind: str, fragments: int, federate: Federate
) -> None:
    common = [f"layout.kind={kind}", f"outer.fragments={fragments}", "rounds=5"]
    periods = ["outer.first_moment_every=1", "outer.second_moment_every=1"]
    des_loc = federate("outer=des_loc", *periods, *common)
    local_adamw = federate("outer=local_adamw", *common)
    assert_identical(des_loc.state, local_adamw.state)
    assert_identical(des_loc.outer.tensors(), local_adamw.outer.tensors())
    assert des_loc.traffic == local_adamw.traffic


# --- moments --------------------------------------------------------------------------------------


Moments = dict[str, dict[str, Tensor]]


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int, int], Moments]:
    """Note every worker's moments at the start and at the end of every round's training."""
    found: dict[tuple[str, int, int], Moments] = {}
    place = [0, 0]

    def copied(inner: Any, optimizer: Any) -> Moments:
        if not optimizer.state:
            return {}
        return {
            name: {k: v.clone() for k, v in inner.moments(optimizer, name).items()}
            for name in MOMENTS
        }

    run_round, train = worker.run_round, worker.train

    def note_place(task: Any, batches: Any) -> Any:
        place[:] = [task.server_round, task.worker]
        return run_round(task, batches)

    def note(model: Any, probe: Any, optimizer: Any, inner: Any, *args: Any, **kwargs: Any) -> Any:
        found["start", place[0], place[1]] = copied(inner, optimizer)
        result = train(model, probe, optimizer, inner, *args, **kwargs)
        found["end", place[0], place[1]] = copied(inner, optimizer)
        return result

    monkeypatch.setattr(client, "run_round", note_place)
    monkeypatch.setattr(worker, "train", note)
    return found


def assert_is_mean(got: Tensor, copies: list[Tensor]) -> None:
    """Compare with the mean; where copies cancel, rounding is relative to them."""
    stacked = torch.stack(copies)
    atol = 1e-6 * float(stacked.abs().max())
    torch.testing.assert_close(got, stacked.mean(0), rtol=1e-6, atol=atol)


@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
@pytest.mark.parametrize("kind", ["fixed", "random"])
def test_local_adamw_starts_all_workers_from_the_mean_of_their_moments(
    kind: str, routing: str, federate: Federate, noted: dict[tuple[str, int, int], Moments]
) -> None:
    """K = 1: holders agree on every moment, whether they held the expert before or not."""
    federation = federate(
        "outer=local_adamw",
        "local.steps=1",
        "rounds=4",
        f"layout.kind={kind}",
        f"model.routing={routing}",
    )
    layouts = {s.record.server_round: s.record.layout for s in federation.rounds}
    if kind == "random":
        assert layouts[1] != layouts[2]
    for server_round in (2, 3, 4):
        before, now = layouts[server_round - 1], layouts[server_round]
        for name in MOMENTS:
            for entry in federation.spec.shared:
                ends = [noted["end", server_round - 1, w][name][entry.key] for w in range(WORKERS)]
                assert not torch.equal(ends[0], ends[1])
                for w in range(WORKERS):
                    start = noted["start", server_round, w][name][entry.key]
                    assert_is_mean(start, ends)
                    assert torch.equal(start, noted["start", server_round, 0][name][entry.key])
            for entry in federation.spec.expert:
                layer = entry.layer or 0
                for expert in range(federation.spec.num_experts):

                    def row(when: str, r: int, w: int, layout: Layout) -> Tensor:
                        held = layout.of_worker(w)[layer]  # noqa: B023
                        moments = noted[when, r, w][name][entry.key]  # noqa: B023
                        return moments[held.index(expert)]  # noqa: B023

                    ends = [
                        row("end", server_round - 1, w, before)
                        for w in before.holders(layer, expert)
                    ]
                    for w in now.holders(layer, expert):
                        assert_is_mean(row("start", server_round, w, now), ends)
    assert all(s.record.replies[0]["fresh_state"] == 0 for s in federation.rounds[1:])


def test_des_loc_keeps_workers_own_moments_between_its_periods(
    federate: Federate, noted: dict[tuple[str, int, int], Moments]
) -> None:
    federate(*OUTER["des_loc"], *EVERYWHERE, "rounds=7")
    averaged = {"exp_avg": {3, 5, 7}, "exp_avg_sq": {4, 7}}
    key = "model.norm.weight"
    for server_round in range(2, 8):
        for name in MOMENTS:
            starts = [noted["start", server_round, w][name][key] for w in range(WORKERS)]
            is_common = all(torch.equal(start, starts[0]) for start in starts)
            assert is_common == (server_round in averaged[name])
            if not is_common:
                own = [noted["end", server_round - 1, w][name][key] for w in range(WORKERS)]
                assert all(map(torch.equal, starts, own))


# --- fragments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fragments", [1, 2])
def test_every_key_is_synchronised_once_in_as_many_rounds_as_fragments(
    fragments: int, federate: Federate
) -> None:
    federation = federate("outer=nesterov", f"outer.fragments={fragments}", "rounds=4")
    before = federation.initial
    for snapshot in federation.rounds:
        fragment = (snapshot.record.server_round - 1) % fragments
        for key, value in snapshot.state.items():
            part = slices(key, value, fragment, fragments)
            if len(part):
                assert not torch.equal(part, slices(key, before[key], fragment, fragments)), key
            # All else stays, to the last bit.
            for other in set(range(fragments)) - {fragment}:
                rest, old = (
                    slices(key, each[key], other, fragments) for each in (snapshot.state, before)
                )
                assert torch.equal(rest, old), key
        before = snapshot.state


def test_a_worker_that_lost_its_disk_gets_its_whole_slice_and_the_run_goes_on(
    tmp_path: Path,
) -> None:
    settings = micro("outer=local_adamw", "outer.fragments=2", "rounds=6")
    federation = Federation(settings, tmp_path)

    def lose(record: RoundRecord) -> None:
        if record.server_round == 3:
            (folder,) = tmp_path.glob("*/worker-001")
            shutil.rmtree(folder)

    federation.after_round = lose
    federation.run()
    assert failures(federation) == {
        4: {1: "LostStateError: worker 1 has no weights of round 3 (Flower error 2)"}
    }
    layout = federation.rounds[0].record.layout
    plain = costs.predict_bytes(micro("outer=average"), layout).down_per_worker[1]
    down = [federation.traffic.down[r, 1] for r in range(1, 7)]
    half = costs.predict_round(settings, layout, 4).down_per_worker[1]
    # Round 5: weights and both moments of everything.
    assert down == [plain, half, half, half, 3 * plain, half]
    assert half == 3 * plain // 2
    fresh = [
        s.record.replies[1]["fresh_state"] for s in federation.rounds if s.record.server_round != 4
    ]
    assert fresh == [1, 0, 0, 1, 0]
    # The others never notice.
    assert [federation.traffic.down[r, 0] for r in range(1, 7)] == [plain] + [half] * 5


@pytest.mark.parametrize("outer", ["average", "local_adamw"])
def test_a_worker_whose_reply_did_not_count_gets_everything_next_time(
    outer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = client.run_round

    def instead(task: Any, batches: Any) -> Any:
        result = inner(task, batches)
        if (task.worker, task.server_round) == (1, 3):
            # Too late: its state of this round is on its disk already.
            raise RuntimeError("the network is down")
        return result

    monkeypatch.setattr(client, "run_round", instead)
    settings = micro(*OUTER[outer], "outer.fragments=2", "rounds=5")
    federation = Federation(settings, tmp_path)
    seen: dict[int, Weights] = {}
    start = worker._starting_weights

    def note(task: Any) -> Any:
        received, current = start(task)
        if task.worker == 1:
            seen[task.server_round] = {key: value.clone() for key, value in current.items()}
        return received, current

    monkeypatch.setattr(worker, "_starting_weights", note)
    federation.run()
    assert list(failures(federation)) == [3]
    layout = federation.rounds[0].record.layout
    plain = costs.predict_bytes(micro("outer=average"), layout).down_per_worker[1]
    times = 3 if outer == "local_adamw" else 1
    down = [federation.traffic.down[r, 1] for r in range(1, 6)]
    assert down == [plain, *[times * plain // 2] * 2, times * plain, times * plain // 2]
    # It starts from the global weights, without a trace of what it trained in vain ...
    spec, residents = federation.spec, layout.of_worker(1)
    globally = federation.rounds[2].state
    assert torch.equal(spec.pack_shared(seen[4]), spec.pack_shared(globally))
    assert torch.equal(spec.pack_experts(seen[4]), spec.pack_experts(globally, residents))
    # ... whereas in other rounds a part is its own.
    assert not torch.equal(spec.pack_shared(seen[3]), spec.pack_shared(federation.rounds[1].state))


def test_with_fragments_a_worker_goes_on_from_its_own_weights_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[str, int], Weights] = {}
    start, train = worker._starting_weights, worker.train
    now = [0]

    def note_start(task: Any) -> Any:
        received, current = start(task)
        if task.worker == 0:
            now[0] = task.server_round
            for name, state in (("received", received), ("start", current)):
                seen[name, now[0]] = {key: value.clone() for key, value in state.items()}
        else:
            now[0] = 0
        return received, current

    def note_end(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = train(model, *args, **kwargs)
        if now[0]:
            state = {key: value.detach().clone() for key, value in model.named_parameters()}
            seen["end", now[0]] = state
        return result

    monkeypatch.setattr(worker, "_starting_weights", note_start)
    monkeypatch.setattr(worker, "train", note_end)
    federation = Federation(micro("outer.fragments=2", "rounds=4"), tmp_path).run()
    spec, layout = federation.spec, federation.rounds[0].record.layout
    for server_round in (2, 3, 4):
        globally = federation.rounds[server_round - 2].state
        synced, own = (spec.fragment((server_round + i) % 2, 2) for i in (0, 1))
        start_state, end = seen["start", server_round], seen["end", server_round - 1]
        assert torch.equal(synced.pack_shared(start_state), synced.pack_shared(globally))
        assert torch.equal(own.pack_shared(start_state), own.pack_shared(end))
        assert torch.equal(own.pack_experts(start_state), own.pack_experts(end))
        # What its next pseudo-gradient starts from is always the server's.
        received = seen["received", server_round]
        held = layout.of_worker(0)
        assert torch.equal(spec.pack_shared(received), spec.pack_shared(globally))
        assert torch.equal(spec.pack_experts(received), spec.pack_experts(globally, held))


# --- bytes ----------------------------------------------------------------------------------------


LAYOUTS = {
    "fixed": ["layout.kind=fixed"],
    "random": ["layout.kind=random"],
    "every two": ["layout.kind=random", "layout.reshuffle_every=2"],
    "every three": ["layout.kind=random", "layout.reshuffle_every=3", "layout.overlap=1"],
    "rolling": ["layout.kind=rolling"],
    "warm": ["layout.kind=fixed", "layout.warm_rounds=2"],
}


@pytest.mark.parametrize(
    ("outer", "layout"),
    # Nesterov's momentum stays on the server.
    [(outer, layout) for outer in OUTER for layout in LAYOUTS if outer != "nesterov"]
    + [("nesterov", "fixed"), ("nesterov", "random")],
)
@pytest.mark.parametrize("fragments", [1, 2])
def test_predicted_bytes_are_the_bytes_of_every_round_and_worker(
    outer: str, fragments: int, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_no_training(monkeypatch)
    family = {"average": "deepseek-v3", "nesterov": "olmoe", "local_adamw": "fomoe"}
    settings = micro(
        *OUTER[outer],
        *LAYOUTS[layout],
        f"outer.fragments={fragments}",
        f"model={family.get(outer, 'olmoe')}-tiny",
        "model.num_experts=6",
        f"model.routing={'partitioned' if layout in ('random', 'rolling') else 'skip_token'}",
        "rounds=9" if outer != "des_loc" else "rounds=14",
        "wire.up=bfloat16",
    )
    federation = Federation(settings, tmp_path).run()
    assert failures(federation) == {}
    previous = None
    for snapshot in federation.rounds:
        record = snapshot.record
        predicted = costs.predict_round(settings, record.layout, record.server_round, previous)
        for w in range(WORKERS):
            place = record.server_round, w
            assert federation.traffic.down[place] == predicted.down_per_worker[w], place
            assert federation.traffic.up[place] == predicted.up_per_worker[w], place
        assert (record.bytes_down, record.bytes_up) == (predicted.down, predicted.up)
        if layout == "fixed":
            payloads = costs.predict_payloads(settings, record.layout, record.server_round)
            for traffic, workers in zip((record.up, record.down), payloads, strict=True):
                for kind in ("shared", "experts", "moments"):
                    expected = sum(getattr(payload, kind) for payload in workers)
                    assert traffic.by_kind[kind] == expected, (record.server_round, kind)
        previous = record.layout


# --- options --------------------------------------------------------------------------------------


@pytest.fixture
def one_round(federate: Federate) -> Callable[..., tuple[Weights, Federation]]:
    """Return a function that gives how the first round moved the weights."""

    def run(*overrides: str) -> tuple[Weights, Federation]:
        federation = federate("rounds=1", *overrides)
        assert failures(federation) == {}
        return {k: v - federation.initial[k] for k, v in federation.state.items()}, federation

    return run


OneRound = Callable[..., tuple[Weights, Federation]]


def is_router(key: str) -> bool:
    return ".gate." in key


def is_expert(key: str) -> bool:
    return ".experts." in key


def assert_scaled(got: Tensor, by: Tensor | float, base: Tensor) -> None:
    """Compare moves; they are differences of weights, so rounding is relative to those."""
    torch.testing.assert_close(got, by * base, rtol=1e-4, atol=5e-7)


def test_an_expert_rate_scales_the_moves_of_experts_only(one_round: OneRound) -> None:
    base, _ = one_round()
    moved, _ = one_round("outer.expert_lr=0.5")
    for key, value in base.items():
        assert_scaled(moved[key], 0.5 if is_expert(key) else 1.0, value)


def test_the_root_of_holders_scales_every_key_by_its_own_replies(one_round: OneRound) -> None:
    base, _ = one_round()
    moved, _ = one_round("outer.sqrt_holders=true")
    for key, value in base.items():
        # Three workers share, two hold an expert.
        assert_scaled(moved[key], (2.0 if is_expert(key) else 3.0) ** 0.5, value)


def test_router_rows_over_holders_change_router_rows_only(
    one_round: OneRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies: dict[int, Tensor] = {}
    inner = client.run_round

    def note(task: Any, batches: Any) -> Any:
        result = inner(task, batches)
        replies[task.worker] = result.shared
        return result

    monkeypatch.setattr(client, "run_round", note)
    base, _ = one_round()
    moved, federation = one_round("outer.router_rows=holders")
    layout = federation.rounds[0].record.layout
    for key, value in base.items():
        if not is_router(key):
            assert torch.equal(moved[key], value)
            continue
        for expert in range(federation.spec.num_experts):
            rows = [
                federation.spec.split_shared(replies[w])[key][expert]
                for w in layout.holders(int(key.split(".")[2]), expert)
            ]
            assert len(rows) == 2
            assert_scaled(moved[key][expert], -1.0, torch.stack(rows).mean(0))
            assert not torch.equal(moved[key][expert], value[expert])


def test_routed_weights_change_experts_only_and_by_the_loads(
    one_round: OneRound, monkeypatch: pytest.MonkeyPatch
) -> None:
    replies: dict[int, Any] = {}
    inner = client.run_round

    def note(task: Any, batches: Any) -> Any:
        replies[task.worker] = inner(task, batches)
        return replies[task.worker]

    monkeypatch.setattr(client, "run_round", note)
    base, _ = one_round()
    moved, federation = one_round("outer.weighting=routed")
    layout, changed = federation.rounds[0].record.layout, 0
    for key, value in base.items():
        if not is_expert(key):
            assert torch.equal(moved[key], value)
            continue
        layer = int(key.split(".")[2])
        for expert in range(federation.spec.num_experts):
            total, mean = 0, torch.zeros(value.shape[1:])
            for w in layout.holders(layer, expert):
                residents = layout.of_worker(w)
                pieces = federation.spec.split_experts(replies[w].experts, residents)
                load = int(replies[w].report.routing.load[layer, expert])
                total += load
                mean += load * pieces[key][residents[layer].index(expert)]
            if total:
                assert_scaled(moved[key][expert], -1.0 / total, mean)
                changed += not torch.equal(moved[key][expert], value[expert])
            else:
                assert moved[key][expert].eq(0).all()
    assert changed > 10


def test_uniform_weights_equal_token_weights_where_all_have_as_many(federate: Federate) -> None:
    assert_identical(
        federate("rounds=2", "outer.weighting=uniform").state, federate("rounds=2").state
    )


def test_every_balance_preset_runs_and_differs(federate: Federate) -> None:
    ends = {
        name: federate("rounds=3", "local.steps=1", f"balance={name}")
        for name in ("off", "switch", "pooled", "recommended")
    }
    assert all(failures(end) == {} for end in ends.values())
    gates = {
        name: tuple(end.state["model.layers.0.mlp.gate.weight"].flatten().tolist())
        for name, end in ends.items()
    }
    assert len(set(gates.values())) == len(gates)
    # In the first round there is nothing to pool yet.
    first = [ends[name].rounds[0].state for name in ("switch", "pooled")]
    assert_identical(first[0], first[1])


def test_pooled_loads_are_those_of_all_workers_in_the_round_before(
    federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[Tensor | None]] = {}
    inner = client.run_round

    def note(task: Any, batches: Any) -> Any:
        seen.setdefault(task.server_round, []).append(task.pooled_share)
        return inner(task, batches)

    monkeypatch.setattr(client, "run_round", note)
    federation = federate("balance=pooled", "rounds=3")
    assert seen[1] == [None] * WORKERS
    for server_round in (2, 3):
        counts = federation.rounds[server_round - 2].record.counts
        load = sum(counts[w].load for w in range(WORKERS))
        assert isinstance(load, Tensor)
        expected = load / load.sum(1, keepdim=True)
        for share in seen[server_round]:
            assert share is not None
            torch.testing.assert_close(share, expected)


@pytest.mark.parametrize("routing", ["skip_token", "partitioned"])
def test_pooled_loads_survive_a_round_without_one_of_the_workers(
    routing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one holder of each expert, nobody spoke for the experts of a worker that failed."""
    inner = client.run_round

    def instead(task: Any, batches: Any) -> Any:
        if (task.worker, task.server_round) == (1, 2):
            raise RuntimeError("no power")
        return inner(task, batches)

    monkeypatch.setattr(client, "run_round", instead)
    settings = micro("balance=pooled", "layout.overlap=1", f"model.routing={routing}", "rounds=4")
    assert list(failures(Federation(settings, tmp_path).run())) == [2]


@pytest.mark.parametrize("model", ["fomoe", "deepseek-v3", "glm4-moe"])
def test_the_loss_free_bias_travels_and_moves(model: str, one_round: OneRound) -> None:
    words = [f"model={model}-tiny", "model.num_experts=6", "local.steps=1"]
    still, _ = one_round("balance=off", *words)
    moved, _ = one_round("balance=loss_free", *words)
    for key, value in still.items():
        if key.endswith("e_score_correction_bias"):
            assert value.eq(0).all()
            # A mean over three workers of steps of 0.001.
            steps = (moved[key] * 3000).round()
            assert steps.abs().max() > 0
            torch.testing.assert_close(moved[key], steps / 3000, rtol=0, atol=1e-7)
        else:
            assert torch.equal(moved[key], value), key


def test_a_bias_rate_needs_a_router_with_a_bias() -> None:
    with pytest.raises(SettingsError, match=r"balance\.bias_rate=0\.001 .*model\.family=olmoe"):
        micro("balance=loss_free")


@pytest.mark.parametrize("way", ["up", "down"])
def test_moments_do_not_travel_as_float16(way: str) -> None:
    """Squares of gradients lie below its smallest number, and a root of 0 stands in a divisor."""
    with pytest.raises(SettingsError, match="use bfloat16 or float32"):
        micro("outer=local_adamw", f"wire.{way}=float16")
    micro("outer=average", f"wire.{way}=float16")
    micro("outer=local_adamw", f"wire.{way}=bfloat16")


@pytest.mark.parametrize("outer", OUTER)
def test_bfloat16_on_the_wire_stays_close(outer: str, federate: Federate) -> None:
    words = [*OUTER[outer], "outer.fragments=2", "rounds=4"]
    half = federate(*words, "wire.up=bfloat16", "wire.down=bfloat16")
    full = federate(*words)
    assert failures(half) == {}
    for key, value in full.state.items():
        moved = (value - full.initial[key]).norm()
        assert (half.state[key] - value).norm() < 0.25 * moved, key


# --- through the command line -----------------------------------------------------------------


Start = Callable[..., RunDirectory]


@pytest.fixture
def words(small_text: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(live, "write_report", lambda run: [])
    return [
        "run",
        "preset=tiny",
        f"data.path={small_text}",
        "local.threads=1",
        "local.steps=1",
        "local.batch_size=2",
        "eval.max_tokens=128",
        "eval.sample_tokens=0",
    ]


@pytest.fixture
def start(words: list[str], tmp_path: Path) -> Start:
    def run(name: str, *overrides: str) -> RunDirectory:
        assert main([*words, f"output_dir={tmp_path / name}", *overrides]) == 0
        return RunDirectory(tmp_path / name)

    return run


def weights(run: RunDirectory) -> Weights:
    name = (run.checkpoints / "latest").read_text(encoding="utf-8").strip()
    folder = run.checkpoints / name
    return {
        f"{path.stem}/{key}": value
        for path in sorted(folder.glob("*.safetensors"))
        for key, value in load_file(path).items()
    }


def test_fragments_divide_the_peak_bytes_of_a_round(start: Start) -> None:
    plain, parted = start("plain", "rounds=5"), start("parted", "rounds=5", "outer.fragments=2")
    up, down = (
        {
            run.path.name: [row[f"comm/bytes_{way}"] for row in run.read_metrics()]
            for run in (plain, parted)
        }
        for way in ("up", "down")
    )
    assert max(up["parted"]) * 2 == max(up["plain"])
    assert up["parted"] == [up["plain"][0] // 2] * 5
    assert down["parted"] == [down["plain"][0]] + [down["plain"][0] // 2] * 4
    settings = load_settings([f"resume={parted.path}", "rounds=5"])
    layout = Layout.from_json(parted.read_layouts()["1"])
    for server_round in range(1, 6):
        predicted = costs.predict_round(settings, layout, server_round)
        assert up["parted"][server_round - 1] == predicted.up
        assert down["parted"][server_round - 1] == predicted.down
    summary = costs.summary(settings)
    assert [summary[f"bytes/{way}_per_round"] for way in ("up", "down")] == [up["parted"][4]] * 2


def test_a_killed_run_of_fragments_and_moments_resumes_bit_by_bit(
    start: Start, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes = [
        "outer=local_adamw", "outer.fragments=2", "layout.kind=random", "layout.reshuffle_every=3",
        "layout.num_workers=3", "layout.overlap=2", "balance=recommended", "rounds=6",
        "checkpoint.every=2", "outer.weighting=routed", "outer.router_rows=holders",
    ]  # fmt: skip
    straight = start("straight", *modes)
    inner = client.run_round

    def kill(task: Any, batches: Any) -> Any:
        result = inner(task, batches)
        if (task.server_round, task.worker) == (5, 1):
            raise KeyboardInterrupt
        return result

    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(client, "run_round", kill)
        assert main([*words, f"output_dir={out}", *modes]) == 130
    assert main(["run", f"resume={out}"]) == 0
    resumed = RunDirectory(out)
    assert_identical(weights(resumed), weights(straight))
    rows = [
        # The text of a task names the run directory, which differs.
        [
            {k: v for k, v in row.items() if "second" not in k and "overhead" not in k}
            for row in run.read_metrics()
        ]
        for run in (resumed, straight)
    ]
    assert json.dumps(rows[0]) == json.dumps(rows[1])
    assert [row["round/workers_failed"] for row in rows[0]] == [0] * 6
