"""What privacy a run has spent, by Flower's accountant (Renyi, over dp-accounting).

Flower's own wrappers clip replies and add noise, but they need replies with identical keys and
FedAvg's aggregation. Replies here differ in their keys, so only the accountant is used. Every round
in which any worker took part is one release of the Gaussian mechanism. Workers are not sampled, so
nothing is amplified by sampling.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.serverapp import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
)
from flwr.supercore.privacy_accounting import SamplingMethod

from fomoe_flwr.config import PrivacySettings, Settings, SettingsError


class PrivacyLedger:
    """Counts the releases of a run."""

    def __init__(self, settings: PrivacySettings, num_workers: int) -> None:
        try:
            from flwr.serverapp import RdpAccountant

            self._accountant = RdpAccountant(
                PrivacyConfig(
                    target_delta=settings.delta,
                    population_size=num_workers,
                    # Removing a worker has the effect of setting its update to zero.
                    neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
                    sampling_method=SamplingMethod.NO_AMPLIFICATION,
                )
            )
        except ImportError as error:
            raise SettingsError(
                f"privacy.noise_multiplier={settings.noise_multiplier} needs an accountant: "
                "pip install 'fomoe-flwr[privacy]'"
            ) from error
        self._event = GaussianPrivacyEvent(
            noise_multiplier=settings.noise_multiplier,
            sample_size=num_workers,
            population_size=num_workers,
        )
        self._delta = settings.delta

    def spend(self, releases: int = 1) -> float:
        """Note releases; return epsilon so far, at `privacy.delta`."""
        self._accountant.compose(self._event, releases)
        return self.epsilon

    @property
    def epsilon(self) -> float:
        """Epsilon so far."""
        return self._accountant.get_epsilon(self._delta) if self._accountant.num_releases else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the ledger for a checkpoint."""
        return self._accountant.state_dict()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the ledger of a checkpoint. Raises ValueError for another run's."""
        self._accountant.load_state_dict(dict(state))


def open_ledger(settings: Settings) -> PrivacyLedger | None:
    """Return the ledger of a run with noise.

    Raises SettingsError where its rounds would spend more than `privacy.max_epsilon`.
    """
    privacy = settings.privacy
    if not privacy.noise_multiplier:
        return None
    planned = PrivacyLedger(privacy, settings.layout.num_workers).spend(settings.rounds)
    if 0 < privacy.max_epsilon < planned:
        raise SettingsError(
            f"rounds={settings.rounds} with privacy.noise_multiplier={privacy.noise_multiplier} "
            f"spend epsilon={planned:.3g} at privacy.delta={privacy.delta}, more than "
            f"privacy.max_epsilon={privacy.max_epsilon}"
        )
    return PrivacyLedger(privacy, settings.layout.num_workers)
