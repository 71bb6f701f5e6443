"""Data sets that grow: more shards in one scan, several scans decided by one rule; never another result than one scan of all."""

import shutil
from pathlib import Path

import pytest
from builders import decision_table, tree_bytes, write_shards

from sanitize.commands.clean import clean, clean_together, preview
from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.config import ThresholdPolicy
from sanitize.errors import ConfigError, RefusedError
from sanitize.kept_samples import KeptSamples

FIFTH = ThresholdPolicy("fraction", fraction=0.2)


@pytest.fixture
def months(tmp_path):
    """january and february: three shards of one data set, and all of them in one folder."""
    write_shards(tmp_path / "all", [20, 9, 16])
    for name, parts in (("january", ["0000", "0001"]), ("february", ["0002"])):
        (tmp_path / name).mkdir()
        for part in parts:
            shutil.copy(tmp_path / "all" / f"part-{part}.tar", tmp_path / name)
    return tmp_path


def outputs(folder) -> dict[str, bytes]:
    """What a later step takes: decisions and tars."""
    return {name: data for name, data in tree_bytes(folder).items() if name.startswith(("clean", "quar", "decisions"))}


def test_an_appended_scan_is_the_scan_of_all(months, scan_config):
    scan(scan_config(months / "all", out="whole", policy=FIFTH))
    scan(scan_config(months / "january", out="grown", policy=FIFTH))
    result = scan(scan_config(months / "february", out="grown", policy=FIFTH, append=True))
    assert (result.samples, result.cleaned.kept + result.cleaned.removed) == (45, 45)
    assert outputs(months / "grown") == outputs(months / "whole")
    assert verify(str(months / "grown"), deep=True).problems == ()
    assert sum(1 for _ in KeptSamples(str(months / "grown"))) == result.cleaned.kept


def test_appending_again_changes_nothing(months, scan_config):
    scan(scan_config(months / "january", out="grown", policy=FIFTH))
    more = scan_config(months / "february", out="grown", policy=FIFTH, append=True)
    scan(more)
    before = tree_bytes(months / "grown")
    scan(more)
    assert tree_bytes(months / "grown") == before


def test_without_append_other_shards_are_refused(months, scan_config):
    scan(scan_config(months / "january", out="grown", policy=FIFTH))
    with pytest.raises(RefusedError, match="holds a scan that differs in shards"):
        scan(scan_config(months / "february", out="grown", policy=FIFTH))


def test_another_shard_of_the_same_name_is_not_appended(months, scan_config):
    scan(scan_config(months / "january", out="grown", policy=FIFTH))
    write_shards(months / "other", [3])
    with pytest.raises(RefusedError, match="holds a scan that differs in shards"):
        scan(scan_config(months / "other", out="grown", policy=FIFTH, append=True))


def test_scans_that_are_cleaned_together_have_one_rule(months, scan_config):
    scan(scan_config(months / "all", out="whole", policy=FIFTH))
    for name in ("january", "february"):
        scan(scan_config(months / name, out=f"{name}-scanned", scores_only=True))
    outs = [str(months / f"{name}-scanned") for name in ("january", "february")]
    results = clean_together(outs, FIFTH)
    assert sum(result.removed for result in results) == 9
    assert results == preview(outs, FIFTH)
    whole = outputs(months / "whole")
    assert {**outputs(months / "january-scanned"), **outputs(months / "february-scanned")} == whole
    before = [tree_bytes(Path(out)) for out in outs]
    assert clean_together(outs, FIFTH) == results
    assert [tree_bytes(Path(out)) for out in outs] == before
    assert [verify(out, deep=True).problems for out in outs] == [(), ()]


def test_a_scan_that_is_cleaned_alone_again_is_decided_alone(months, scan_config):
    for name in ("january", "february"):
        scan(scan_config(months / name, out=f"{name}-scanned", scores_only=True))
    outs = [str(months / f"{name}-scanned") for name in ("january", "february")]
    clean_together(outs, FIFTH)
    together = decision_table(outs[0]).column("threshold")[0].as_py()
    assert clean(outs[0], FIFTH).removed == round(0.2 * 29)
    assert decision_table(outs[0]).column("threshold")[0].as_py() != together


def test_scans_by_different_efforts_are_not_decided_together(months, scan_config):
    scan(scan_config(months / "january", out="a", scores_only=True))
    scan(scan_config(months / "february", out="b", scores_only=True, effort="fast"))
    with pytest.raises(
        RefusedError, match=r"b: was scanned with another detector or effort than .*a, so their scores do not compare"
    ):
        clean_together([str(months / "a"), str(months / "b")], FIFTH)


def test_a_scan_that_is_given_twice_is_refused(months, scan_config):
    scan(scan_config(months / "january", out="a", scores_only=True))
    with pytest.raises(ConfigError, match=r"a: is given twice\. Name each scan once\."):
        clean_together([str(months / "a"), f"{months}/./a"], FIFTH)
