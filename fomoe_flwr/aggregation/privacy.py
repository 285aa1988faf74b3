"""Client-level differential privacy for updates of which each worker holds a part.

A worker's whole update, shared and residents as one vector with zeros for ghosts, is clipped to
norm C. The sum over workers then changes by at most C when one worker's update becomes zero, so
noise of standard deviation z * C on the sum is the Gaussian mechanism with multiplier z (McMahan et
al., arXiv 1710.06963). The mean of a key over its n holders is the sum over n, so its noise has
z * C / n. Neighbours differ by one worker's update being zero: who takes part and who holds what is
public.
"""

from __future__ import annotations

import math
import secrets

import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from fomoe_flwr.aggregation.holder_mean import HolderMean
from fomoe_flwr.codecs.slabs import slabs, squared_norm


def clip(shared: Tensor, experts: Tensor, norm: float) -> tuple[Tensor, Tensor]:
    """Scale an update down to a norm; a smaller one is returned as it is."""
    length = math.sqrt(squared_norm(shared) + squared_norm(experts))
    if length <= norm:
        return shared, experts
    scale = norm / length
    return shared * scale, experts * scale


class NoiseSource:
    """Normal numbers from a stream of AES-CTR; a fresh key from the system unless one is given.

    torch's generator would do for statistics, but its state can be recovered from its output, and
    with it the noise. A given key is for experiments that must repeat: it protects nothing.
    """

    def __init__(self, key: bytes | None = None) -> None:
        cipher = Cipher(algorithms.AES(key or secrets.token_bytes(32)), modes.CTR(bytes(16)))
        self._stream = cipher.encryptor()

    def normal(self, count: int) -> Tensor:
        """Return so many standard normal numbers, fp32, by Box and Muller's method in float64."""
        pairs = -(-count // 2)
        drawn = self._stream.update(bytes(16 * pairs))
        bits = torch.frombuffer(bytearray(drawn), dtype=torch.int64) if pairs else torch.empty(0)
        # 53 bits, in (0, 1]: the logarithm of 0 is not wanted.
        uniform = ((bits.long() & (2**53 - 1)).double() + 1) * 2.0**-53
        radius = (-2 * uniform[:pairs].log()).sqrt()
        angle = 2 * math.pi * uniform[pairs:]
        normal = torch.cat((radius * angle.cos(), radius * angle.sin()))
        return normal[:count].float()


def add_noise(mean: HolderMean, std: float, source: NoiseSource) -> None:
    """Add noise of `std` on the sum of a key to its mean over holders; keys without one stay.

    Needs replies of equal weight.
    """
    if mean.shared_count:
        _add(mean.shared, std / mean.shared_count, source)
    for entry in mean.row_entries:
        counts = mean.expert_count[mean.spec.layer_of(entry.key)].tolist()
        for row, count in zip(mean.rows[entry.key], counts, strict=True):
            if count:
                _add(row.view(-1), std / count, source)


def _add(vector: Tensor, std: float, source: NoiseSource) -> None:
    for part in slabs(vector.numel()):
        vector[part].add_(source.normal(part.stop - part.start), alpha=std)
