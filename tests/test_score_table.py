"""The score table: what goes in comes out, groups of rows are closed at a fixed size, and a broken scan leaves no table."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sanitize import storage
from sanitize.errors import StorageError
from sanitize.records import DecodedImage
from sanitize.stages import score_table
from sanitize.stages.score_table import STATISTICS, ScoreWriter, read, rows

CALIBRATION = np.arange(9, dtype=np.float32)  # 0 .. 8
PIXELS = torch.zeros(3, 4, 4, dtype=torch.uint8)


def image(index: int, reason: str = "", **changes: Any) -> DecodedImage:
    pixels, status = (None, "undecodable") if reason else (PIXELS, "ok")
    return DecodedImage(index, f"k{index}", f"{index:064x}", pixels, 4, 5, status, reason, **changes)


def numbers(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def table_of(count: int, first: int = 0) -> pa.Table:
    scores = np.arange(first, first + count, dtype=np.float32)
    return rows(
        "s",
        [image(first + i) for i in range(count)],
        {"score": scores, "error": np.zeros(count, np.float32)},
        CALIBRATION,
    )


def written(path, tables) -> bytes:
    with storage.atomic_write(str(path)) as target, ScoreWriter(target, {"shard": "s"}) as writer:
        for table in tables:
            writer.add(table)
    return path.read_bytes()


def group_sizes(path) -> list[int]:
    metadata = pq.read_metadata(path)
    return [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]


# ---------------------------------------------------------------- rows


def test_every_image_gets_a_row_and_only_the_decodable_ones_a_score():
    decoded = [image(0), image(1, reason="broken"), image(2)]
    found = rows("a/b", decoded, {"score": numbers(7.5, 3), "error": numbers(1, 2)}, CALIBRATION).to_pylist()
    assert [row["key"] for row in found] == ["k0", "k1", "k2"]
    assert [row["index"] for row in found] == [0, 1, 2]
    assert {row["shard"] for row in found} == {"a/b"}
    assert [row["score"] for row in found] == [7.5, None, 3]
    assert [row["error"] for row in found] == [1, None, 2]
    assert [row["p_value"] for row in found] == [pytest.approx(0.2), None, pytest.approx(0.7)]
    assert [(row["status"], row["reason"]) for row in found] == [("ok", ""), ("undecodable", "broken"), ("ok", "")]
    assert (found[0]["width"], found[0]["height"], found[0]["sha256"]) == (4, 5, "0" * 64)


def test_a_statistic_that_was_not_measured_is_null_for_all():
    found = rows("s", [image(0)], {"score": numbers(1)}, CALIBRATION)
    for name in set(STATISTICS) - {"score", "p_value"}:
        assert found.column(name).null_count == 1


def test_a_statistic_that_one_image_lacks_is_null_there():
    columns = {"score": numbers(1, 2), "text_similarity": numbers(math.nan, 0.5)}
    found = rows("s", [image(0, caption_reason="no caption"), image(1)], columns, CALIBRATION).to_pylist()
    assert [row["text_similarity"] for row in found] == [None, 0.5]
    assert [(row["status"], row["reason"]) for row in found] == [("ok", "no caption"), ("ok", "")]


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_becomes_a_row_with_its_reason(score):
    columns = {"score": numbers(1, score), "error": numbers(1, 2)}
    good, bad = rows("s", [image(0), image(1)], columns, CALIBRATION).to_pylist()
    assert good["status"] == "ok"
    assert (bad["status"], bad["score"], bad["p_value"], bad["error"]) == ("not_finite", None, None, None)
    assert bad["reason"] == "the model gave no finite score or had no memory for it"


def test_a_name_that_is_no_column_is_our_own_mistake():
    with pytest.raises(AssertionError, match="not in STATISTICS: {'loudness'}"):
        rows("s", [image(0)], {"score": numbers(1), "loudness": numbers(1)}, CALIBRATION)


# ---------------------------------------------------------------- writing


def test_rows_come_back_from_the_file_in_their_order(tmp_path):
    table = table_of(7)
    written(tmp_path / "s.parquet", [table.slice(0, 3), table.slice(3)])
    assert pq.read_table(tmp_path / "s.parquet").to_pylist() == table.to_pylist()
    assert read(str(tmp_path / "s.parquet"), ["key", "score"]).to_pylist() == table.select(["key", "score"]).to_pylist()
    metadata = pq.read_schema(tmp_path / "s.parquet").metadata
    assert (metadata[b"schema_version"], metadata[b"shard"]) == (str(score_table.SCHEMA_VERSION).encode(), b"s")


@pytest.mark.parametrize("size", [1, 2, 5, 7, 8, 24])
def test_the_same_rows_give_the_same_bytes_whatever_the_batch_size(tmp_path, monkeypatch, size):
    monkeypatch.setattr(score_table, "ROW_GROUP", 8)
    expected = written(tmp_path / "whole.parquet", [table_of(24)])
    parts = [table_of(min(size, 24 - first), first) for first in range(0, 24, size)]
    assert written(tmp_path / "parts.parquet", parts) == expected
    assert group_sizes(tmp_path / "parts.parquet") == [8, 8, 8]


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (7, [7]), (8, [8]), (9, [8, 1]), (20, [8, 8, 4])])
def test_a_group_is_closed_as_soon_as_it_is_full(tmp_path, monkeypatch, count, sizes):
    monkeypatch.setattr(score_table, "ROW_GROUP", 8)
    written(tmp_path / "s.parquet", [table_of(1, first) for first in range(count)])
    assert group_sizes(tmp_path / "s.parquet") == sizes
    assert pq.read_table(tmp_path / "s.parquet").column("index").to_pylist() == list(range(count))


def test_rows_do_not_wait_in_memory_longer_than_one_group(tmp_path, monkeypatch):
    monkeypatch.setattr(score_table, "ROW_GROUP", 8)
    with storage.atomic_write(str(tmp_path / "s.parquet")) as target, ScoreWriter(target, {}) as writer:
        begun = target.size
        writer.add(table_of(7))
        assert target.size == begun
        writer.add(table_of(1, 7))
        assert target.size > begun


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_no_table_and_is_the_one_that_is_raised(tmp_path, error):
    def fails():
        with storage.atomic_write(str(tmp_path / "s.parquet")) as target, ScoreWriter(target, {}) as writer:
            writer.add(table_of(3))
            raise error("the scorer broke")

    with pytest.raises(error, match="the scorer broke"):
        fails()
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- reading


def test_a_damaged_table_says_what_to_do(tmp_path):
    data = written(tmp_path / "s.parquet", [table_of(3)])
    (tmp_path / "s.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(
        StorageError, match=r"s\.parquet: not a readable score table \(.*\)\. Run `sanitize verify --repair`, then"
    ):
        read(str(tmp_path / "s.parquet"), ["score"])


def test_null_reads_as_nan():
    table = rows("s", [image(0), image(1, reason="broken")], {"score": numbers(1)}, CALIBRATION)
    assert np.isnan(score_table.numbers(table, "score")).tolist() == [False, True]
    assert score_table.numbers(table, "width").dtype == np.float32


def test_statistics_are_nan_where_an_image_was_not_perturbed(tmp_path):
    names = [*score_table.CHANGE_COLUMNS]
    columns = {name: numbers(-1, math.nan) for name in names}
    columns |= {"score": numbers(1, 2), "embedding_norm": numbers(3, 4), "neighbour_distance": numbers(0.5, 0.6)}
    written(tmp_path / "s.parquet", [rows("s", [image(0), image(1)], columns, CALIBRATION)])
    found = score_table.statistics(read(str(tmp_path / "s.parquet"), score_table.STATISTICS_COLUMNS))
    assert found.shape == (2, len(names) + 2)
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1, : len(names)]).all()
