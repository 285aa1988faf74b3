from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fomoe_flwr.config import DataSettings
from fomoe_flwr.data import DataError
from fomoe_flwr.data.batches import Batches, BlockBatches, StreamBatches, open_stream
from fomoe_flwr.data.stream import heldout_documents
from fomoe_flwr.data.tokens import TokenBlocks

LENGTH = 8


def numbered_blocks(num_blocks: int) -> TokenBlocks:
    """Blocks that tell by their first token which they are."""
    flat = np.arange(num_blocks * LENGTH + 1, dtype=np.uint32)
    return TokenBlocks(flat, np.zeros(num_blocks, dtype=np.int16), ("a",), LENGTH)


def make(num_blocks: int = 10, batch_size: int = 3, seed: int = 0, worker: int = 0) -> BlockBatches:
    blocks = numbered_blocks(2 * num_blocks)
    return BlockBatches(blocks, np.arange(0, 2 * num_blocks, 2), batch_size, seed, worker)


def served(batches: BlockBatches, num_batches: int) -> list[int]:
    return [
        int(first) // LENGTH
        for n in range(num_batches)
        for first in batches.batch(n)[:, 0].tolist()
    ]


def test_a_batch_is_windows_of_int64() -> None:
    batch = make().batch(0)
    assert batch.shape == (3, LENGTH + 1)
    assert batch.dtype == torch.int64
    assert (batch.diff(dim=1) == 1).all()


@given(
    num_blocks=st.integers(1, 20),
    batch_size=st.integers(1, 20),
    seed=st.integers(0, 2**31 - 1),
    worker=st.integers(0, 99),
)
def test_every_epoch_serves_every_block_once(
    num_blocks: int, batch_size: int, seed: int, worker: int
) -> None:
    if batch_size > num_blocks:
        with pytest.raises(DataError, match="too small corpus"):
            make(num_blocks, batch_size, seed, worker)
        return
    batches = make(num_blocks, batch_size, seed, worker)
    blocks = served(batches, -(-3 * num_blocks // batch_size))
    for epoch in range(3):
        part = blocks[epoch * num_blocks : (epoch + 1) * num_blocks]
        assert sorted(part) == list(range(0, 2 * num_blocks, 2))


def test_a_batch_depends_on_nothing_but_seed_worker_and_position() -> None:
    forward = make()
    expected = [forward.batch(n) for n in range(12)]
    backward = make()
    for n in (11, 0, 7, 3, 3, 10, 2):
        assert torch.equal(backward.batch(n), expected[n])
    shuffled = BlockBatches(forward.blocks, forward.indices[::-1], 3, 0, 0)
    assert torch.equal(shuffled.batch(5), expected[5])


def test_seed_worker_and_epoch_give_other_orders() -> None:
    base = served(make(), 10)
    assert served(make(seed=1), 10) != base
    assert served(make(worker=1), 10) != base
    assert base[:10] != base[10:20]
    assert served(make(seed=0, worker=1), 10) != served(make(seed=1, worker=0), 10)


def test_cursor_resumes() -> None:
    batches = make()
    for _ in range(5):
        batches.next_batch()
    state = json.loads(json.dumps(batches.state()))
    expected = [batches.next_batch() for _ in range(6)]
    again = make()
    again.restore(state)
    assert all(torch.equal(again.next_batch(), batch) for batch in expected)
    assert again.state() == batches.state() == {"position": 11}


@pytest.mark.parametrize("state", [{}, {"position": -1}, {"position": "3"}, {"position": True}])
def test_foreign_cursor_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(DataError, match="cursor"):
        make().restore(state)
    with pytest.raises(ValueError, match="negative"):
        make().batch(-1)


def test_too_few_blocks_say_what_to_change() -> None:
    with pytest.raises(DataError) as error:
        make(num_blocks=2, batch_size=3, worker=5)
    message = str(error.value)
    assert "worker 5 has 2 blocks of 8 tokens, local.batch_size=3 needs 3" in message
    for key in ("data.path", "local.batch_size", "data.sequence_length"):
        assert key in message


# Streams


def write_shards(folder: Path, num_files: int, rows_per_file: int = 40) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in range(num_files):
        rows = [
            {"text": f"File {file} row {row}. " + "More words. " * (row % 5), "domain": f"d{file}"}
            for row in range(rows_per_file)
        ]
        (folder / f"part{file}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def stream_settings(folder: Path, **changes: object) -> DataSettings:
    fields: dict[str, object] = {
        "path": str(folder), "dataset": "json", "sequence_length": 16, "holdout_fraction": 0.1,
    }  # fmt: skip
    return DataSettings(**{**fields, **changes})  # type: ignore[arg-type]


def stream_batches(
    data: DataSettings, tokenizer: PreTrainedTokenizerFast, worker: int = 0, num_workers: int = 1
) -> StreamBatches:
    return StreamBatches(open_stream(data, worker, num_workers, "train"), tokenizer, data, 3)


@pytest.mark.parametrize(("num_files", "num_workers"), [(1, 1), (4, 2), (3, 2)])
def test_stream_resumes_exactly_twice_in_a_row(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, num_files: int, num_workers: int
) -> None:
    write_shards(tmp_path, num_files)
    data = stream_settings(tmp_path)
    straight = stream_batches(data, tokenizer, num_workers - 1, num_workers)
    expected = [straight.next_batch() for _ in range(150)]
    assert straight.passes > 1
    served_batches: list[torch.Tensor] = []
    state = stream_batches(data, tokenizer, num_workers - 1, num_workers).state()
    for steps in (1, 40, 0, 13, 50, 46):  # the passes end in between
        batches = stream_batches(data, tokenizer, num_workers - 1, num_workers)
        batches.restore(json.loads(json.dumps(state)))
        assert batches.state() == state
        served_batches += [batches.next_batch() for _ in range(steps)]
        state = batches.state()
    assert all(torch.equal(a, b) for a, b in zip(served_batches, expected, strict=True))
    assert state == straight.state()


def test_stream_resumes_in_place_from_any_state(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_shards(tmp_path, 2)
    batches = stream_batches(stream_settings(tmp_path), tokenizer)
    states, expected = [], []
    for _ in range(60):
        states.append(batches.state())
        expected.append(batches.next_batch())
    for start in (59, 3, 0, 30, 17):
        batches.restore(states[start])
        for wanted in expected[start : start + 25]:
            assert torch.equal(batches.next_batch(), wanted)


def test_stream_windows_are_the_packed_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_shards(tmp_path, 1)
    data = stream_settings(tmp_path)
    texts = [row["text"] for row in open_stream(data, 0, 1, "train")]
    flat = [token for text in texts for token in [*tokenizer.encode(text), 0]]
    batches: Batches = stream_batches(data, tokenizer)
    windows = torch.cat([batches.next_batch() for _ in range(6)])
    assert windows.shape == (18, 17)
    assert windows.dtype == torch.int64
    assert (windows[1:, 0] == windows[:-1, -1]).all()
    assert [*windows[:, :-1].flatten().tolist(), int(windows[-1, -1])] == flat[: 18 * 16 + 1]


@pytest.mark.parametrize(("num_files", "num_workers"), [(1, 3), (4, 2), (4, 4), (3, 2)])
def test_stream_shares_are_disjoint_and_heldout_is_nobodys(
    tmp_path: Path, num_files: int, num_workers: int
) -> None:
    write_shards(tmp_path, num_files)
    data = stream_settings(tmp_path)
    shares = [
        [row["text"] for row in open_stream(data, worker, num_workers, "train")]
        for worker in range(num_workers)
    ]
    held = {
        split: {d.text for d in heldout_documents(data, split, 1000)}  # type: ignore[arg-type]
        for split in ("validation", "test")
    }
    train = [text for share in shares for text in share]
    assert len(set(train)) == len(train)
    assert not set(train) & (held["validation"] | held["test"])
    assert not held["validation"] & held["test"]
    assert len(train) + len(held["validation"]) + len(held["test"]) == 40 * num_files


def test_stream_takes_named_splits(tmp_path: Path) -> None:
    write_shards(tmp_path / "train", 1)
    write_shards(tmp_path / "validation", 1, rows_per_file=5)
    data = stream_settings(tmp_path)
    assert len(heldout_documents(data, "validation", 100)) == 5
    assert len(heldout_documents(data, "validation", 2)) == 2
    num_test = len(heldout_documents(data, "test", 100))
    assert num_test + sum(1 for _ in open_stream(data, 0, 1, "train")) == 40


def test_heldout_documents_have_domains(tmp_path: Path) -> None:
    write_shards(tmp_path, 2)
    data = stream_settings(tmp_path)
    assert {d.domain for d in heldout_documents(data, "test", 99)} <= {"d0", "d1"}
    other = stream_settings(tmp_path, domain_key="topic")
    assert {d.domain for d in heldout_documents(other, "test", 99)} == {"json"}


def test_text_and_parquet_stream(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    texts = [f"Paragraph {n} of the text." for n in range(60)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    for builder in ("text", "parquet"):
        data = stream_settings(tmp_path, dataset=builder)
        assert stream_batches(data, tokenizer).next_batch().shape == (3, 17)


def refused(data: DataSettings, tokenizer: PreTrainedTokenizerFast, num_workers: int = 1) -> str:
    with pytest.raises(DataError) as error:
        stream_batches(data, tokenizer, 0, num_workers).next_batch()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_streams_that_cannot_be_read(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert "set data.path" in refused(DataSettings(dataset="json"), tokenizer)
    assert "data.dataset='no/such'" in refused(DataSettings(dataset="no/such"), tokenizer)
    write_shards(tmp_path / "a", 1)
    assert "set data.text_key" in refused(stream_settings(tmp_path / "a", text_key="x"), tokenizer)
    wrong = stream_settings(tmp_path / "a", dataset="parquet")
    assert "holds no parquet file" in refused(wrong, tokenizer)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.jsonl").write_text("not json at all")
    assert "cannot be read" in refused(stream_settings(tmp_path / "b"), tokenizer)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl").write_text('{"text": " "}\n' * 5)
    assert "has no text" in refused(stream_settings(tmp_path / "c"), tokenizer)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_text('{"text": 5}\n' * 5)
    assert "holds int" in refused(stream_settings(tmp_path / "d"), tokenizer)
    with pytest.raises(DataError, match=r"worker 2 must lie in 0\.\.1"):
        open_stream(stream_settings(tmp_path / "a"), 2, 2, "train")
    with pytest.raises(DataError, match="is not one of"):
        open_stream(stream_settings(tmp_path / "a"), 0, 1, "dev")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no text in its test split"):
        heldout_documents(stream_settings(tmp_path / "a", holdout_fraction=1e-9), "test", 5)


def test_foreign_stream_cursor_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_shards(tmp_path, 1)
    with pytest.raises(DataError, match="cursor"):
        stream_batches(stream_settings(tmp_path), tokenizer).restore({"position": 3})


def test_an_empty_share_next_to_full_ones_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    write_shards(tmp_path, 1, rows_per_file=1)
    data = stream_settings(tmp_path, holdout_fraction=1e-9)
    with pytest.raises(DataError, match=r"layout\.num_workers"):
        stream_batches(data, tokenizer, 4, 5).next_batch()
