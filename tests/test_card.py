"""`sanitize card`: a section of a data card that says what was removed, by what and by whom."""

import hashlib
import json
import re
from pathlib import Path

import pytest
from builders import REMOVE_SOME, some_keys, write_lines
from webdataset.tariterators import base_plus_ext

from sanitize.auditing.croissant import KEY
from sanitize.commands.card import card
from sanitize.commands.clean import clean
from sanitize.commands.review import review
from sanitize.commands.verify import verify
from sanitize.errors import ConfigError


def test_a_card_says_what_was_removed_by_what_rule_and_why(scanned_copy):
    text = card(scanned_copy).text
    assert text.startswith("## Cleaning\n\n38 of 54 samples were kept by `sanitize` ")
    assert "| Removed | 16, of them 0 without a score" in text
    assert "| Rule | fraction 0.3, scores above " in text
    rows = [
        row.strip("|").split("|")[0]
        for row in text.partition("| reason |\n|---|---|\n")[2].split("\n")
        if row[:1] == "|"
    ]
    assert sum(int(count) for count in rows) == 16
    assert "(p " not in text
    assert "What people decided" not in text


def test_a_card_names_who_overruled_the_score_and_markup_stays_text(scanned_copy, tmp_path):
    keys = write_lines(tmp_path / "keys.txt", some_keys(scanned_copy, False, 2))
    review(scanned_copy, release=keys, by="Ada | <b>", note="[fine](http://x) `ok`", when="2026-01-02T03:04:05+00:00")
    text = card(scanned_copy, tmp_path / "card.md").text
    assert (tmp_path / "card.md").read_text() == text
    assert (
        "| 2026-01-02T03:04:05+00:00 | Ada &#124; &lt;b&gt; | 2 release | &#91;fine](http://x) &#96;ok&#96; |" in text
    )
    assert "| Decided by a person | 2 |" in text
    assert card(scanned_copy).text == text
    clean(scanned_copy, REMOVE_SOME, ignore_reviews=True)
    assert "Ada" not in card(scanned_copy).text
    assert verify(scanned_copy).problems == ()


def test_croissant_names_every_clean_tar_with_its_hash_and_size(scanned_copy, tmp_path):
    """Held against mlcroissant 1.1 by hand: valid, and its records are the kept samples."""
    text = card(scanned_copy, tmp_path / "scanned" / "croissant.json").text
    assert (tmp_path / "scanned" / "croissant.json").read_text() == text
    said = json.loads(text)
    *tars, images = said["distribution"]
    assert said["conformsTo"][0] == "http://mlcommons.org/croissant/1.0"
    assert said["name"] == "scanned-clean"
    assert {tar["@id"] for tar in tars} == {f"clean/{path.name}" for path in Path(scanned_copy, "clean").glob("*.tar")}
    for tar in tars:
        data = Path(scanned_copy, tar["contentUrl"]).read_bytes()
        assert (tar["sha256"], tar["contentSize"]) == (hashlib.sha256(data).hexdigest(), f"{len(data)} B")
    assert [entry["@id"] for entry in images["containedIn"]] == [tar["@id"] for tar in tars]
    assert "*.png" in images["includes"]
    assert {field["source"]["fileSet"]["@id"] for field in said["recordSet"][0]["field"]} == {"images"}


def test_croissant_says_of_the_cleaning_what_markdown_says(scanned_copy, tmp_path):
    keys = write_lines(tmp_path / "keys.txt", some_keys(scanned_copy, False, 2))
    review(scanned_copy, release=keys, by="Ada", note="fine", when="2026-01-02T03:04:05+00:00")
    text, markdown = card(scanned_copy, tmp_path / "c.json").text, card(scanned_copy).text
    said = json.loads(text)
    protocol = said["rai:dataPreprocessingProtocol"]
    assert said["description"] in markdown
    assert "Decided by Ada, 2026-01-02T03:04:05+00:00: 2 release. fine" in protocol
    for name in ("Rule", "Detector", "Decisions", "Removed"):
        fact = next(line for line in protocol if line.startswith(f"{name}: "))
        assert f"| {fact.replace(': ', ' | ', 1)} |" in markdown
    assert all(limit in markdown for limit in said["rai:dataLimitations"])
    assert card(scanned_copy, tmp_path / "c.json").text == text


@pytest.mark.parametrize("name", ["a.jpg", "folder/b.v1.png", "d.e/key.jpeg"])
def test_the_key_in_croissant_is_that_of_webdataset(name):
    assert re.findall(KEY, name) == [base_plus_ext(name)[0].rsplit("/", 1)[-1]]


def test_a_card_of_what_is_not_decided_or_not_markdown_is_refused(scanned_copy, tmp_path):
    with pytest.raises(
        ConfigError, match=r"card\.txt: a card is Markdown or Croissant\. Name a file that ends with \.md or \.json\."
    ):
        card(scanned_copy, "card.txt")
    (tmp_path / "scanned" / "summary.json").unlink()
    with pytest.raises(
        ConfigError, match=r"pass 2 is not through, so nothing is decided\. Run `sanitize clean .*` first\."
    ):
        card(scanned_copy)
