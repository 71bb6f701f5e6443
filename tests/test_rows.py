"""Hugging Face data as Parquet or as `save_to_disk` left it: which columns are taken, and what damage costs."""

import json
import random

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import encoded, random_image
from source_builders import HF_IMAGE, classes, hf_table, packed, refused, samples, save_to_disk, write_parquet

from sanitize.commands.pack import pack
from sanitize.errors import ConfigError, SanitizeError, ShardError
from sanitize.sources import open_source
from sanitize.sources.samples import Wanted


def table_of(**columns):
    return pa.table({"image": [encoded(random_image(n)) for n in range(3)], **columns})


@pytest.fixture(params=["one Parquet file", "Parquet files", "save_to_disk", "one Arrow file"])
def hugging_face(request, tmp_path):
    """(what to pack, rows of each file) of eleven samples."""
    parts, one = [hf_table(7), hf_table(4, first=7)], [hf_table(11)]
    if request.param == "one Parquet file":
        return write_parquet(tmp_path / "t.parquet", one[0]), [11]
    if request.param == "Parquet files":
        for number, part in enumerate(parts):
            write_parquet(tmp_path / "data" / f"train-{number}.parquet", part)
        return tmp_path, [7, 4]
    if request.param == "save_to_disk":
        return save_to_disk(tmp_path, parts), [7, 4]
    return save_to_disk(tmp_path, one) / "data-00000-of-00001.arrow", [11]


def test_hugging_face_data_gives_bytes_labels_captions_and_the_row_of_each(hugging_face):
    source, rows = hugging_face
    found = samples(source)
    assert [s.image for s in found] == [encoded(random_image(n)) for n in range(11)]
    assert [(s.label, s.caption, s.extension) for s in found] == [
        (n % 2, f"photo {n}".encode(), "png") for n in range(11)
    ]
    assert [s.row for s in found] == [row for count in rows for row in range(count)]
    assert len({s.source for s in found}) == len(rows)
    assert classes(source) == ("cat", "dog")


@pytest.mark.parametrize(
    "ranges", [[(0, 11)], [(0, 3), (3, 6), (6, 11)], [(6, 11), (0, 3)], [(0, 1), (9, 10), (2, 3), (3, 4)]]
)
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_any_rows_can_be_read_in_any_order(tmp_path, kind, ranges):
    write_parquet(tmp_path / "t.parquet", hf_table(11))
    save_to_disk(tmp_path / "disk", [hf_table(11)])
    source = open_source(str(tmp_path / ("t.parquet" if kind == "parquet" else "disk")), Wanted())
    read = source.reader()
    for start, stop in ranges:
        assert [s.caption for s in read(start, stop)] == [f"photo {n}".encode() for n in range(start, stop)]


def test_a_pattern_takes_one_split(tmp_path):
    for name in ("train-0", "train-1", "test-0"):
        write_parquet(tmp_path / "data" / f"{name}.parquet", hf_table(2))
    for pattern, below in (("data/train-*.parquet", ""), ("**/train-?.parquet", "data/")):
        assert {s.source for s in samples(tmp_path / pattern)} == {f"{below}train-{n}.parquet" for n in (0, 1)}
    refused(tmp_path / "*.parquet", r"matches no \.parquet file\. A pattern means Parquet files")


def test_caches_beside_a_data_set_are_no_part_of_it(tmp_path):
    save_to_disk(tmp_path, [hf_table(2)])
    (tmp_path / "data-00000-of-00001.arrow").rename(tmp_path / "kept")
    save_to_disk(tmp_path, [hf_table(3, first=50)])
    (tmp_path / "data-00000-of-00001.arrow").rename(tmp_path / "cache-1f.arrow")
    (tmp_path / "kept").rename(tmp_path / "data-00000-of-00001.arrow")
    assert len(samples(tmp_path)) == 2


def test_several_splits_are_packed_one_by_one(tmp_path):
    for split in ("test", "train"):
        save_to_disk(tmp_path / split, [hf_table(2)])
    (tmp_path / "dataset_dict.json").write_text(json.dumps({"splits": ["test", "train"]}))
    refused(tmp_path, r"holds several data sets \(test, train\)\. .* for example sanitize pack {at}/test packed/")
    assert len(samples(tmp_path / "test")) == 2


@pytest.mark.parametrize("name", ["../other.arrow", "gone.arrow", 7, None])
def test_a_state_that_names_other_files_is_refused(tmp_path, name):
    save_to_disk(tmp_path / "in", [hf_table(2)])
    (tmp_path / "other.arrow").write_bytes((tmp_path / "in" / "data-00000-of-00001.arrow").read_bytes())
    (tmp_path / "in" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    refused(tmp_path / "in", r"state\.json: names files that are not there, or none\. Save the data set again")


def test_images_without_a_name_are_known_by_their_first_bytes(tmp_path):
    kinds = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "BMP": "bmp", "WEBP": "webp", "TIFF": "tif", "PPM": "ppm"}
    images = [encoded(random_image(1), kind) for kind in kinds]
    write_parquet(tmp_path / "t.parquet", pa.table({"img": [*images, b"<html>", b"", None]}))
    found = samples(tmp_path / "t.parquet")
    assert [s.extension for s in found[:7]] == list(kinds.values())
    assert [s.problem for s in found[7:]] == ["not an image, by its name or its first bytes"] * 2 + [
        "there are no image bytes"
    ]


def test_a_path_in_somebody_elses_data_set_is_not_opened(tmp_path):
    (tmp_path / "private.png").write_bytes(encoded(random_image(1)))
    rows = [{"image": {"bytes": None, "path": str(tmp_path / "private.png")}}]
    write_parquet(tmp_path / "t.parquet", pa.Table.from_pylist(rows, pa.schema([("image", HF_IMAGE)])))
    (found,) = samples(tmp_path / "t.parquet")
    assert (found.image, found.problem) == (
        None,
        f"holds no image bytes, only the path {tmp_path}/private.png, which is not opened",
    )


LABELS = {  # values of a column → labels, names
    "texts": (["owl", "cat", "owl"], [1, 0, 1], ("cat", "owl")),
    "texts that are numbers": (["7", "1", "7"], [7, 1, 7], ()),
    "numbers with zeros before them": (["07", "7", "07"], [0, 1, 0], ("07", "7")),
    "an empty text": (["owl", "", None], [0, None, None], ("owl",)),
    "numbers": ([3, None, -1], [3, None, -1], ()),
    "yes and no": ([True, False, None], [1, 0, None], ()),
    "categories": (pa.array(["b", "a", "b"]).dictionary_encode(), [1, 0, 1], ("a", "b")),
    "a control character": (["a\x1b", "b", "b"], [0, 1, 1], (r"a\x1b", "b")),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_are_whole_numbers_or_texts_in_sorted_order(tmp_path, case):
    values, numbers, names = LABELS[case]
    path = write_parquet(tmp_path / "t.parquet", table_of(label=values))
    assert [s.label for s in samples(path)] == numbers
    assert classes(path) == names


def test_captions_are_copied_as_they_are_and_of_lists_the_first(tmp_path):
    odd = pa.array([b"caf\xe9", b"ok", b""]).view(pa.string())
    path = write_parquet(tmp_path / "t.parquet", table_of(text=odd, many=[["one", "two"], [], None]))
    assert [s.caption for s in samples(path)] == [b"caf\xe9", b"ok", None]
    assert [s.caption for s in samples(path, captions="many")] == [b"one", None, None]
    assert [s.caption for s in samples(path, captions="none")] == [None] * 3


COLUMNS = {  # what is asked for → words of the refusal
    "an unknown column": ({"labels": "age"}, "--labels age: is no column of {at}. It has: image, label, score"),
    "labels that are none": (
        {"labels": "score"},
        "--labels score: {at} holds double there, whole numbers or text was expected",
    ),
    "captions that are none": (
        {"captions": "score"},
        "--captions score: {at} holds double there, text, or lists of text",
    ),
    "folders of a table": ({"labels": "folders"}, "--labels folders: {at} is a table. Name the column"),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_a_column_that_does_not_fit_is_refused(tmp_path, case):
    wanted, words = COLUMNS[case]
    refused(write_parquet(tmp_path / "t.parquet", table_of(label=[1, 2, 3], score=[0.5] * 3)), words, **wanted)


def test_tables_without_images_are_refused(tmp_path):
    write_parquet(tmp_path / "t.parquet", pa.table({"path": ["a.jpg"], "label": [1]}))
    refused(
        tmp_path, r"no column holds image bytes \(columns: path, label\)\. A table of paths is packed as a single file"
    )


def test_arrow_files_are_read_from_a_disk_alone(tmp_path):
    save_to_disk(tmp_path, [hf_table(2)])
    fsspec.filesystem("memory").put(f"{tmp_path}/", "/arrow-remote", recursive=True)
    with pytest.raises(
        ConfigError, match=r"memory://.*arrow: Arrow files are read from a local disk only\. Copy the folder"
    ):
        open_source("memory://arrow-remote", Wanted())


def test_remote_parquet_is_read_as_local(tmp_path):
    write_parquet(tmp_path / "t.parquet", hf_table(9))
    fsspec.filesystem("memory").put(f"{tmp_path}/t.parquet", "/tables/data/t.parquet")
    for place in ("memory://tables", "memory://tables/data/t.parquet", "memory://tables/**/*.parquet"):
        source = open_source(place, Wanted())
        assert [s.image for s in source.reader()(0, 9)] == [encoded(random_image(n)) for n in range(9)]


def test_of_several_image_columns_one_must_be_named(tmp_path):
    path = write_parquet(tmp_path / "t.parquet", pa.table({"left": [b"GIF8l"], "right": [b"GIF8r"]}))
    refused(path, "which column holds the images\\? Name one: --images left or right")
    assert samples(path, images="right")[0].image == b"GIF8r"


def test_more_texts_than_classes_can_be_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sanitize.sources.columns.MAX_CLASSES", 2)
    path = write_parquet(tmp_path / "t.parquet", table_of(label=["a", "b", "c"]))
    refused(path, "{at}, column label: holds more than 2 different texts, which are no classes. .* --labels none")


def test_a_table_whose_name_cannot_be_shown_is_refused(tmp_path):
    write_parquet(tmp_path / "a\x1b[2J.parquet", hf_table(2))
    refused(tmp_path, r"{at}/a\\x1b\[2J\.parquet: its name holds control characters or is not UTF-8\. Rename it")


def test_files_with_other_columns_are_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", hf_table(2))
    write_parquet(tmp_path / "b.parquet", hf_table(2).drop_columns("label"))
    refused(tmp_path, r"b\.parquet: its column label is not that of .*a\.parquet\. Pack them into two folders")


# ---------------------------------------------------------------- damage


def test_a_damaged_row_group_costs_its_rows_alone(sanitize, tmp_path):
    path = write_parquet(tmp_path / "t.parquet", hf_table(12))
    column = pq.read_metadata(path).row_group(1).column(0)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 8] = b"\xff" * 8
    path.write_bytes(data)
    code, output = sanitize("pack", "t.parquet", "out", "--shard-size", 5)
    assert code == 1
    assert "out: 8 samples in 3 shards; 4 could not be read" in output
    assert "sample: t.parquet, row 4: its row group is damaged (" in output
    assert sorted({int(name[:9]) for name in packed(tmp_path / "out")}) == [0, 1, 2, 3, 8, 9, 10, 11]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_without_its_end_is_refused_before_anything_is_written(tmp_path, kind):
    path = write_parquet(tmp_path / "t.parquet", hf_table(12))
    if kind == "arrow":
        path = next(save_to_disk(tmp_path / "disk", [hf_table(12)]).glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ConfigError, match=r"cannot be read as a table \(.*\)\. Correct it, or write it again"):
        pack(str(path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_arrow_offsets_that_point_elsewhere_are_not_followed(tmp_path):
    folder = save_to_disk(tmp_path / "in", [hf_table(4)], batch=2)
    path = folder / "data-00000-of-00001.arrow"
    offsets = b"\0\0\0\0" + len(encoded(random_image(0))).to_bytes(4, "little")
    data = bytearray(path.read_bytes())
    place = data.index(offsets)
    data[place + 4 : place + 8] = b"\xff\xff\xff\x7f"
    path.write_bytes(data)
    found = samples(folder)
    assert ["its record batch is damaged" in s.problem for s in found] == [True, True, False, False]
    assert found[2].image == encoded(random_image(2))


def test_a_file_that_is_replaced_while_it_is_packed_fails_its_shards_alone(tmp_path):
    path = write_parquet(tmp_path / "t.parquet", hf_table(4))
    source = open_source(str(path), Wanted())
    path.write_bytes(b"gone")
    with pytest.raises(ShardError, match=r"t\.parquet: "):
        list(source.reader()(0, 4))


def test_a_column_whose_name_is_not_utf8_is_refused(tmp_path):
    path = save_to_disk(tmp_path, [hf_table(2)]) / "data-00000-of-00001.arrow"
    path.write_bytes(path.read_bytes().replace(b"caption\0", b"\xffaption\0"))
    refused(path, r"{at}: cannot be read as a table \('utf-8' codec can't decode byte 0xff")


def test_a_file_that_claims_more_rows_than_bytes_is_refused(tmp_path):
    path = write_parquet(tmp_path / "t.parquet", pa.table({"image": pa.nulls(100_000, pa.binary())}), row_group=100_000)
    refused(path, r"{at}: claims 100000 rows of images in \d+ bytes, which cannot be\.")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_thousand_mutants_give_samples_or_words(tmp_path, kind):
    """Seeded. Whatever a table claims, reading it neither crashes nor loses count."""
    path = write_parquet(tmp_path / "t.parquet", hf_table(9))
    if kind == "arrow":
        path = save_to_disk(tmp_path / "disk", [hf_table(9)]) / "data-00000-of-00001.arrow"
    whole, outcomes = path.read_bytes(), {"samples": 0, "words": 0}
    for seed in range(1000):
        rng, mutant = random.Random(seed), bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            size = len(mutant)
            place = rng.choice([rng.randrange(size), rng.randrange(1500), size - 1 - rng.randrange(2500)])
            mutant[place] = rng.choice([0, 127, 128, 255, rng.randrange(256)])
        path.write_bytes(mutant)
        try:
            source = open_source(str(path), Wanted())
            count = min(source.samples, 1000)
            assert len(list(source.reader()(0, count))) == count
            outcomes["samples"] += 1
        except SanitizeError:
            outcomes["words"] += 1
    assert min(outcomes.values()) > 100
