"""What `sanitize review` is told to decide on: ways to name samples, and what is refused in words."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import (
    KEEP_ALL,
    decided,
    decision_rows,
    decision_table,
    image_members,
    some_keys,
    tree_bytes,
    write_csv,
    write_lines,
    write_tar,
)

from sanitize.commands.list_samples import list_samples
from sanitize.commands.review import review
from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.config import ThresholdPolicy
from sanitize.errors import ConfigError, RefusedError


@pytest.fixture
def scanned(scanned_copy) -> str:
    return scanned_copy


@pytest.fixture
def shards(scanned_once) -> Path:
    return scanned_once / "shards"


FORMS: dict[str, Any] = {
    "shard and key, as list writes a .txt": (
        "k.txt",
        lambda path, rows: write_lines(path, [f"{r['shard']}\t{r['key']}" for r in rows]),
    ),
    "windows line ends": (
        "k.txt",
        lambda path, rows: path.write_bytes("".join(f"{r['key']}\r\n" for r in rows).encode()),
    ),
    "CSV of keys": ("k.csv", lambda path, rows: write_csv(path, [{"key": r["key"]} for r in rows])),
    "CSV with a byte order mark": (
        "k.csv",
        lambda path, rows: path.write_text("\ufeffkey\n" + "\n".join(r["key"] for r in rows)),
    ),
    "a part of the decisions": ("k.parquet", lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path)),
    "CSV with place": (
        "k.csv",
        lambda path, rows: write_csv(path, [{n: r[n] for n in ("shard", "key", "index")} for r in rows]),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_samples_are_named_in_the_ways_that_listings_and_tables_write_them(scanned, tmp_path, form):
    name, write = FORMS[form]
    rows = [row for row in decision_rows(scanned).values() if not row["keep"]][:4]
    write(tmp_path / name, rows)
    assert review(scanned, release=tmp_path / name, by="Ada").changed == 4
    assert {row["key"] for row in rows} <= set(decided(scanned))


def test_what_the_report_exports_says_the_word_itself(scanned, tmp_path):
    kept, removed = some_keys(scanned, True, 1), some_keys(scanned, False, 1)
    rows = decision_rows(scanned)
    said = [{"shard": rows[k]["shard"], "key": k, "word": w} for k, w in ((kept[0], "remove"), (removed[0], "release"))]
    result = review(scanned, decisions=write_csv(tmp_path / "d.csv", said), by="Ada")
    assert (result.released, result.removed) == (1, 1)


def test_a_listing_that_is_edited_is_a_review(scanned, tmp_path):
    list_samples(scanned, str(tmp_path / "removed.csv"), only="removed")
    assert review(scanned, release=tmp_path / "removed.csv", by="Ada").cleaned.removed == 0


MISTAKES: dict[str, Any] = {
    "nobody": ({"by": " "}, "by: nobody is named. Say who decides, for example --by 'Ada Lovelace'."),
    "control characters": ({"by": "A\x1b[2Jda"}, r"by: 'A\\x1b[2Jda' holds control characters. Write it without."),
    "a long note": ({"note": "x" * 2001}, "note: 2001 characters, 2000 is the most. Shorten it."),
    "no file": ({"release": "nowhere.txt"}, "nowhere.txt: no such file. Write one key a line, or a .csv or"),
    "nothing": ({"release": ""}, "nothing to review. Name the samples: --release FILE, --remove FILE, --withdraw FILE"),
    "unknown key": (
        {"text": "s000001\nzzz\n"},
        "k.txt, line 2: {out} has no sample 'zzz'. Keys are as in the columns `shard` and `key`",
    ),
    "key of another shard": (
        {"text": "part-0002\ts000001\n"},
        "line 1: shard part-0002 of {out} has no sample 's000001'.",
    ),
    "unknown shard": (
        {"text": "part-9\ts000001\n"},
        "{out} has no shard 'part-9'. It has part-0000, part-0001, part-0002.",
    ),
    "a hostile key": ({"text": "\x1b[2J" + "k" * 200}, r"has no sample '\\x1b[2J" + "k" * 90 + "...'. Keys"),
    "an empty file": ({"text": ""}, "k.txt: names no sample. Write one key a line, or a .csv"),
    "not UTF-8": ({"data": b"s000001\n\xff"}, "k.txt: is not UTF-8 (byte 8). Save it as UTF-8."),
    "no column key": (
        {"name": "k.csv", "text": "shard,sample\na,b\n"},
        "k.csv: has no column `key` (columns: shard, sample).",
    ),
    "broken CSV": ({"name": "k.csv", "text": 'key\n"a'}, "k.csv: is no CSV (unexpected end of data)."),
    "a word in a list": ({"name": "k.csv", "text": "key,word\ns000001,remove\n"}, "Give the file with --decisions."),
    "no Parquet": ({"name": "k.parquet", "text": "x"}, "k.parquet: is no readable Parquet ("),
    "an index in words": (
        {"name": "k.csv", "text": "key,index\ns000001,one\n"},
        "line 2: index 'one' is no number. Leave it out",
    ),
    "an index of nobody": (
        {"name": "k.csv", "text": "key,index\ns000001,9\n"},
        "{out} at index 9 has no sample 's000001'.",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_cannot_be_meant_is_refused_in_words_and_changes_nothing(scanned, tmp_path, case):
    given, words = MISTAKES[case]
    options: dict[str, Any] = dict(given)
    name = options.pop("name", "k.txt")
    if {"text", "data"} & options.keys():
        (tmp_path / name).write_bytes(options.pop("data", b"") or options.pop("text", "").encode())
        options["release"] = str(tmp_path / name)
    options = {"by": "Ada", "release": write_lines(tmp_path / "ok.txt", some_keys(scanned, False, 1))} | options
    before = tree_bytes(tmp_path / "scanned")
    with pytest.raises(ConfigError) as caught:
        review(scanned, **options)
    assert words.replace("{out}", scanned) in str(caught.value)
    assert tree_bytes(tmp_path / "scanned") == before


def test_words_that_contradict_each_other_are_refused(scanned, tmp_path):
    key = some_keys(scanned, False, 1)[0]
    one, other = write_lines(tmp_path / "one.txt", [key]), write_lines(tmp_path / "other.txt", ["s000003", key])
    words = (
        f"other.txt, line 2: sample '{key}' of part-0000 is to remove, but {one}, line 1 says release. Name it once."
    )
    with pytest.raises(ConfigError) as caught:
        review(scanned, release=one, remove=other, by="Ada")
    assert words in str(caught.value)
    assert not (tmp_path / "scanned" / "reviews").exists()


def test_a_word_that_is_none_names_those_there_are(scanned, tmp_path):
    said = write_csv(tmp_path / "d.csv", [{"shard": "part-0000", "key": "s000001", "word": "delete"}])
    with pytest.raises(ConfigError, match=r"d\.csv, line 2: 'delete' is no word\. Write release, remove, withdraw\."):
        review(scanned, decisions=said, by="Ada")


def test_a_key_that_several_shards_have_needs_its_shard(scan_config, tmp_path):
    for name in ("a", "b"):
        write_tar(tmp_path / "in" / f"{name}.tar", image_members({f"s{i}": i for i in range(6)}))
    scan(scan_config(tmp_path / "in", policy=ThresholdPolicy("fraction", fraction=0.3)))
    out = str(tmp_path / "scanned")
    words = (
        r"k\.txt, line 1: 2 shards have a sample 's1': a, b\. Give a \.csv with columns shard and key to say which\."
    )
    with pytest.raises(ConfigError, match=words):
        review(out, remove=write_lines(tmp_path / "k.txt", ["s1"]), by="Ada")
    review(out, remove=write_csv(tmp_path / "k.csv", [{"shard": "b", "key": "s1"}]), by="Ada")
    rows = {(row["shard"], row["key"]): row["reason"] for row in decision_table(out).to_pylist()}
    assert (rows["b", "s1"], "Ada" in rows["a", "s1"]) == ("removed by Ada", False)


def test_keys_that_read_alike_need_their_index(scan_config, tmp_path):
    """One holds a byte that is not UTF-8, the other the text that stands for it."""
    write_tar(tmp_path / "in" / "a.tar", image_members({"x\udcff": 1, "x\\xff": 2, "y": 3}))
    scan(scan_config(tmp_path / "in", policy=KEEP_ALL))
    out = str(tmp_path / "scanned")
    with pytest.raises(ConfigError, match=r"2 samples of a have keys that read 'x\\\\xff'\. Add a column index"):
        review(out, remove=write_lines(tmp_path / "k.txt", ["x\\xff"]), by="Ada")
    review(out, remove=write_csv(tmp_path / "k.csv", [{"key": "x\\xff", "index": "1"}]), by="Ada")
    assert [row["keep"] for row in decision_table(out).to_pylist()] == [True, False, True]
    assert verify(out, deep=True).problems == ()


def test_a_sample_without_a_score_is_released_only_knowingly(scan_config, tmp_path):
    write_tar(tmp_path / "in" / "a.tar", [*image_members({f"s{i}": i for i in range(5)}), ("bad.png", b"no image")])
    scan(scan_config(tmp_path / "in", policy=KEEP_ALL))
    out, file = str(tmp_path / "scanned"), write_lines(tmp_path / "k.txt", ["bad"])
    words = r"sample 'bad' has no score \(undecodable: .*\), so nothing but you says that it is clean\. .* add --release-unscored"
    with pytest.raises(RefusedError, match=words):
        review(out, release=file, by="Ada")
    result = review(out, release=file, by="Ada", release_unscored=True)
    assert (result.cleaned.kept, decision_rows(out)["bad"]["reason"]) == (6, "released by Ada")


def test_a_scan_that_is_not_decided_says_what_to_run(shards, scan_config, tmp_path):
    scan(scan_config(shards, scores_only=True))
    with pytest.raises(ConfigError, match=r"scanned: pass 2 is not through\. Run `sanitize clean .*scanned` first\."):
        review(str(tmp_path / "scanned"), remove=write_lines(tmp_path / "k.txt", ["s000001"]), by="Ada")
