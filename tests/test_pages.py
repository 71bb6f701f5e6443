"""Parts of pages: texts become harmless, numbers become bars."""

import json
import math

import numpy as np
import pytest

from sanitize.pages.histogram import HEIGHT, WIDTH, histogram
from sanitize.pages.rendering import csp_hash, json_text, render

HOSTILE = "</script><!--<b>&amp;\u2028'\""


def test_json_of_a_script_element_cannot_end_it():
    text = str(json_text({HOSTILE: [HOSTILE]}))
    assert json.loads(text) == {HOSTILE: [HOSTILE]}
    assert not {"<", ">", "&", "\u2028"} & set(text)


def test_infinity_is_not_json():
    with pytest.raises(ValueError, match="Out of range"):
        json_text(math.inf)


def test_texts_of_a_page_are_escaped_and_only_our_scripts_may_run():
    page = render("plain", title=HOSTILE, subtitle=HOSTILE, version="1", cards=[(HOSTILE,) * 3], sections=[]).decode()
    assert "<b>" not in page
    assert "script-src 'none'" in page
    assert f"style-src '{csp_hash('style.css')}'" in page


@pytest.mark.parametrize("cut", [None, 0.5, 50.0, math.inf, -math.inf])
@pytest.mark.parametrize("count", [1, 500])
def test_a_histogram_holds_every_sample_inside_its_frame(cut, count):
    scores = np.random.default_rng(0).normal(size=count).astype(np.float32)
    removed = scores > (0.5 if cut is None else cut)
    drawn = histogram(scores, removed, cut, scores[:50], scores + 1)
    assert sum(bar["height"] > 0 for bar in drawn["bars"]) == len(drawn["bars"]) > 0
    for bar in drawn["bars"]:
        assert 0 <= bar["x"] <= WIDTH
        assert 0 <= bar["y"] <= bar["y"] + bar["height"] <= HEIGHT
    counted = sum(
        int(part.split()[0]) for bar in drawn["bars"] if bar["kind"] == "kept" for part in [bar["text"].split(": ")[1]]
    )
    assert counted == int((~removed).sum())


def test_equal_scores_have_a_histogram_too():
    assert histogram(np.full(30, 2, np.float32), np.zeros(30, bool), 2.0, None, None)["bars"]
