"""`sanitize card`: a section of a data card that says what was removed, by what and by whom."""

import pytest
from builders import REMOVE_SOME, some_keys, write_lines

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


def test_a_card_of_what_is_not_decided_or_not_markdown_is_refused(scanned_copy, tmp_path):
    with pytest.raises(ConfigError, match=r"card\.txt: a card is Markdown\. Name a file that ends with \.md\."):
        card(scanned_copy, "card.txt")
    (tmp_path / "scanned" / "summary.json").unlink()
    with pytest.raises(
        ConfigError, match=r"pass 2 is not through, so nothing is decided\. Run `sanitize clean .*` first\."
    ):
        card(scanned_copy)
