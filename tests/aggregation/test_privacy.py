"""Differential privacy: norms are exact, holders give noise its size, nothing is free."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from federated import Federation, assert_identical, use_made_up_data
from micro import micro

from fomoe_flwr.aggregation.holder_mean import HolderMean
from fomoe_flwr.aggregation.privacy import NoiseSource, add_noise, clip
from fomoe_flwr.config import SettingsError
from fomoe_flwr.federation.accounting import PrivacyLedger, open_ledger
from fomoe_flwr.model.state import Entry, StateSpec

KEY = bytes(range(32))
PRIVATE = ("outer.weighting=uniform", "privacy.clip_norm=0.1")


@pytest.mark.parametrize("norm", [1e-3, 1.0, 49.0])
def test_a_clipped_update_has_exactly_the_norm_and_its_direction(norm: float) -> None:
    shared, experts = torch.full((1600,), 1.0), torch.full((900,), -1.0)  # norm 50
    clipped = clip(shared, experts, norm)
    length = math.sqrt(sum(float(v.double().square().sum()) for v in clipped))
    assert length == pytest.approx(norm, rel=1e-6)
    torch.testing.assert_close(clipped[0], shared * norm / 50)
    torch.testing.assert_close(clipped[1], experts * norm / 50)


@pytest.mark.parametrize("norm", [50.0, 51.0, math.inf])
def test_a_smaller_update_is_left_as_it_is(norm: float) -> None:
    shared, experts = torch.full((1600,), 1.0), torch.full((900,), -1.0)
    same = clip(shared, experts, norm)
    assert same[0] is shared
    assert same[1] is experts


def test_noise_of_a_key_is_what_its_holders_leave_of_it() -> None:
    """Expert 0 has three holders, 1 has one, 2 has none; all hold what is shared."""
    size = 40_000
    spec = StateSpec(
        shared=(Entry("model.embed", (size,), None),),
        expert=(Entry("model.layers.0.mlp.experts.up", (3, size), 0),),
        num_layers=1,
        num_experts=3,
    )
    mean = HolderMean(spec)
    mean.rows["model.layers.0.mlp.experts.up"].zero_()
    for residents in (((0, 1),), ((0,),), ((0,),)):
        mean.fold(torch.zeros(size), torch.zeros(spec.experts_size(residents)), residents, 1.0)
    add_noise(mean, 6.0, NoiseSource(KEY))
    rows = mean.rows["model.layers.0.mlp.experts.up"]
    # The standard deviation of a sample's is 1 / sqrt(2 n) of it: five of those.
    tolerance = 5 / math.sqrt(2 * size)
    for values, std in ((mean.shared, 2.0), (rows[0], 2.0), (rows[1], 6.0)):
        assert float(values.double().std()) == pytest.approx(std, rel=tolerance)
        assert abs(float(values.double().mean())) < 5 * std / math.sqrt(size)
    assert not rows[2].any()
    together = torch.stack((mean.shared / 2, rows[0] / 2, rows[1] / 6))
    assert float((torch.corrcoef(together) - torch.eye(3)).abs().max()) < 5 / math.sqrt(size)


def test_noise_is_normal_and_never_the_same_without_a_key() -> None:
    drawn = NoiseSource(KEY).normal(100_001)
    assert drawn.shape == (100_001,)
    assert bool(torch.isfinite(drawn).all())
    for bound, share in ((1.0, 0.6827), (2.0, 0.9545), (3.0, 0.9973)):
        error = 5 * math.sqrt(share * (1 - share) / 100_001)
        assert float((drawn.abs() < bound).double().mean()) == pytest.approx(
            share, abs=error + 1e-4
        )
    assert torch.equal(NoiseSource(KEY).normal(10), NoiseSource(KEY).normal(10))
    assert not torch.equal(NoiseSource().normal(10), NoiseSource().normal(10))
    assert len(NoiseSource(KEY).normal(0)) == 0


def test_epsilon_grows_with_rounds_and_falls_with_noise() -> None:
    def spent(noise: float, rounds: int) -> float:
        privacy = micro(*PRIVATE, f"privacy.noise_multiplier={noise}").privacy
        return PrivacyLedger(privacy, 3).spend(rounds)

    by_round = [spent(1.0, rounds) for rounds in (1, 2, 4, 8)]
    assert by_round == sorted(by_round)
    assert by_round[0] > 0
    assert len(set(by_round)) == 4
    assert spent(0.5, 4) > spent(1.0, 4) > spent(4.0, 4)
    # Gaussian mechanism by Renyi: eps = min_a a T / (2 z^2) + log(1/delta) / (a - 1), at the most.
    crude = min(a * 4 / 2 + math.log(1e5) / (a - 1) for a in (1.5, 2, 3, 4, 5, 6, 8))
    assert spent(1.0, 4) <= crude


def test_a_ledger_goes_on_where_it_stopped() -> None:
    settings = micro(*PRIVATE, "privacy.noise_multiplier=1.0")
    whole, first, second = (PrivacyLedger(settings.privacy, 3) for _ in range(3))
    assert first.epsilon == 0
    first.spend()
    second.restore(first.to_json())
    assert second.spend() == whole.spend(2)


def test_a_run_that_would_spend_too_much_is_refused() -> None:
    words = [*PRIVATE, "privacy.noise_multiplier=1.0", "privacy.max_epsilon=5.0"]
    with pytest.raises(SettingsError, match=r"rounds=50 .* more than privacy\.max_epsilon=5\.0"):
        open_ledger(micro(*words, "rounds=50"))
    assert open_ledger(micro(*words, "rounds=1")) is not None
    assert open_ledger(micro()) is None


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["privacy.noise_multiplier=1.0"], r"privacy\.clip_norm=0\.0, which must be > 0"),
        (["privacy.clip_norm=1.0"], r"needs outer\.weighting to be uniform \(got tokens\)"),
        ([*PRIVATE, "outer=local_adamw"], r"needs outer\.name to be average or nesterov"),
        ([*PRIVATE, "balance.form=global"], r"needs balance\.form to be local"),
        ([*PRIVATE, "layout=balanced"], r"another layout\.kind than balanced"),
    ],
)
def test_what_would_let_updates_out_another_way_is_refused(words: list[str], reason: str) -> None:
    with pytest.raises(SettingsError, match=reason):
        micro(*words)


def test_no_noise_and_no_limit_is_no_privacy_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_made_up_data(monkeypatch)
    words = ("outer=nesterov", "outer.weighting=uniform", "rounds=2")
    plain = Federation(micro(*words), tmp_path / "plain").run()
    free = Federation(micro(*words, "privacy.clip_norm=1e30"), tmp_path / "free").run()
    assert_identical(free.state, plain.state)
    assert free.rounds[-1].record.epsilon is None


def test_a_private_run_reports_what_it_spent_and_repeats_with_a_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_made_up_data(monkeypatch)
    words = (*PRIVATE, "privacy.noise_multiplier=1.0", "rounds=2")
    seeded = [
        Federation(micro(*words, "privacy.noise_seed=1"), tmp_path / name).run() for name in "ab"
    ]
    assert_identical(seeded[0].state, seeded[1].state)
    epsilons = [snapshot.record.epsilon for snapshot in seeded[0].rounds]
    assert epsilons == [PrivacyLedger(micro(*words).privacy, 3).spend(n) for n in (1, 2)]
    secret = Federation(micro(*words), tmp_path / "c").run()
    assert any(not torch.equal(secret.state[k], v) for k, v in seeded[0].state.items())
