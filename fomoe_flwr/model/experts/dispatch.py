"""Dispatch: the rows that residents work on, and the way from tokens to rows and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Dispatch:
    """Where every assignment goes. Rows are sorted by resident, and stable within one.

    Without a host sync nobody knows how many assignments have a resident, so there is room for all
    of them (N = T * K), and only the first `count_1` rows mean anything.
    """

    order_N: Tensor
    """Assignment (token * K + choice) of each row."""
    token_N: Tensor
    """Token of each row."""
    row_TK: Tensor
    """Row of each assignment, int32; at least `count_1` for an assignment to a ghost."""
    ends_R: Tensor
    """Row after the last one of each resident, int32: what `F.grouped_mm` calls `offs`."""

    @property
    def num_rows(self) -> int:
        """Rows that are allocated."""
        return len(self.order_N)

    @property
    def count_1(self) -> Tensor:
        """Rows that belong to a resident, on the device."""
        return self.ends_R[-1:]

    @property
    def resident_of_row(self) -> Tensor:
        """Resident of each row; R for a row that belongs to none."""
        rows = torch.arange(self.num_rows, device=self.ends_R.device, dtype=torch.int32)
        return torch.searchsorted(self.ends_R, rows, right=True)

    def to_rows(self, value_TK: Tensor) -> Tensor:
        """Copy each assignment's number to its row: [N]."""
        return value_TK.reshape(-1).index_select(0, self.order_N)

    def to_assignments(self, value_N: Tensor, like_TK: Tensor) -> Tensor:
        """Bring each row's number to its assignment: [T, K]; ghosts get 0."""
        rows = torch.arange(len(value_N), device=value_N.device)
        value_N = torch.where(rows < self.count_1, value_N, 0)
        out_TK = torch.zeros_like(like_TK)
        out_TK.view(-1)[self.order_N] = value_N.to(like_TK.dtype)
        return out_TK


def make_dispatch(
    slot_TK: Tensor, num_residents: int, has_ghosts: bool = True, host_sync: bool = True
) -> Dispatch:
    """Sort assignments by resident; the slot `num_residents` marks a ghost.

    Where there may be ghosts, their rows are cut off, for which the host waits for the router; with
    `host_sync=False` they stay, empty. `has_ghosts=False` says that no slot is a ghost's.
    """
    top_k, device = slot_TK.shape[-1], slot_TK.device
    # Radix sort takes a pass for each byte of the key.
    narrow = torch.uint8 if num_residents < 2**8 else torch.int32
    slot_N, order_N = torch.sort(slot_TK.reshape(-1).to(narrow), stable=True)
    resident_R = torch.arange(num_residents, device=device, dtype=narrow)
    ends_R = torch.searchsorted(slot_N, resident_R, right=True, out_int32=True)
    num_rows = len(order_N)
    if not num_residents:
        num_rows = 0
    elif has_ghosts and host_sync:
        num_rows = int(ends_R[-1])
    row_TK = torch.empty(slot_TK.numel(), dtype=torch.int32, device=device)
    row_TK[order_N] = torch.arange(len(order_N), dtype=torch.int32, device=device)
    order_N = order_N[:num_rows]
    token_N = torch.div(order_N, top_k, rounding_mode="floor")
    return Dispatch(order_N, token_N, row_TK.view_as(slot_TK), ends_R)
