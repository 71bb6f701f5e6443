"""The page that `sanitize audit` writes, in a real browser: it works, it can be used by all, and no text of the data is more than text.

Needs Debian's chromium (apt-get install chromium) and the package playwright; skipped with these words where they are not there.
"""

import csv
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from builders import decision_table, encoded, random_image, write_tar

from sanitize.commands.audit import audit, why
from sanitize.commands.review import review
from sanitize.commands.scan import scan
from sanitize.commands.verify import verify
from sanitize.config import ScanConfig, ThresholdPolicy

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: apt-get install chromium")
MARKUP = "<img src=x onerror=window~owned=1><b>bold</b>".replace("~", "")
HOSTILE = [  # keys, and captions, as an attacker would choose them
    MARKUP,
    "</script><script>window['owned']=1</script>",
    "'\"><svg onload=window['owned']=1>",
    "<!--",
    "\x1b[31mred\x1b]0;title\x07",
    "\u202egnp-eman\u202c",
    "\u05e9\u05dc\u05d5\u05dd",
    "{{ 7 * 7 }}{% raw %}",
    "=HYPERLINK('x'),\"quoted\"",
    "long" * (1 << 14),
]


def hostile_members() -> list[tuple[str, bytes]]:
    members = []
    for number, text in enumerate(HOSTILE):
        key = text.replace(".", "")
        members += [(f"{key}.cls", text[:40].encode()), (f"{key}.png", encoded(random_image(number)))]
        members += [(f"{key}.txt", text.encode())]
    return members


def plain_members(count: int) -> list[tuple[str, bytes]]:
    members = []
    for number in range(count):
        members += [(f"photo-{number:03d}.cls", str(number % 3).encode())]
        members += [(f"photo-{number:03d}.png", encoded(random_image(100 + number)))]
        members += [(f"photo-{number:03d}.txt", f"caption number {number}".encode())]
    return members


@pytest.fixture(scope="module")
def scanned(tmp_path_factory, detector) -> str:
    """A scan of 80 samples in two shards, 64 of them removed; ten have hostile keys, labels and captions."""
    folder = tmp_path_factory.mktemp("report")
    write_tar(folder / "in" / "a-plain.tar", plain_members(70))
    write_tar(folder / "in" / "b-hostile.tar", hostile_members(), kind=2)
    policy = ThresholdPolicy("fraction", fraction=0.8)
    out = str(folder / "scanned")
    scan(ScanConfig((str(folder / "in"),), str(detector), out, policy=policy, workers=0, force=True, precision="fp32"))
    audit(out)
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed; it is in the extra dev"
    )
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, scanned) -> Iterator[Any]:
    """The report, opened from disk. Ends with: no error, no dialog, and no request but for the file itself."""
    context = browser.new_context(accept_downloads=True)
    page, complaints, requests = context.new_page(), [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))

    def refuse(dialog: Any) -> None:
        complaints.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", refuse)
    page.on("request", lambda request: requests.append(request.url))
    page.goto(Path(scanned, "audit", "report.html").as_uri())
    yield page
    owned = page.evaluate("window.owned")
    context.close()
    assert (complaints, owned) == ([], None)
    assert {url.partition(":")[0] for url in requests} <= {"file", "data", "blob"}


def shown(page: Any) -> list[str]:
    keys: list[str] = page.locator("#grid .key").all_inner_texts()
    return keys


def search(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def choose(page: Any, control: str, value: str) -> None:
    page.select_option(f"#{control}", value)


# ---------------------------------------------------------------- it works


@needs_chromium
def test_the_page_opens_and_shows_the_removed_samples_first(page, tmp_path):
    assert page.title() == "What was flagged in scanned"
    assert page.locator("#grid li").count() == 48
    assert page.locator("#grid li .badge.removed").count() == 48
    assert page.locator("#grid img").first.evaluate("image => image.decode().then(() => image.naturalWidth)") == 16
    page.screenshot(path=tmp_path / "light.png", full_page=True)


@needs_chromium
def test_filters_and_orders(page, scanned):
    kept = {row["key"] for row in decision_table(scanned).to_pylist() if row["keep"]}
    choose(page, "decision", "kept")
    assert len(shown(page)) == len(kept)
    choose(page, "decision", "")
    search(page, "CAPTION number 1")
    choose(page, "order", "key-")
    assert shown(page) == sorted(shown(page), reverse=True)
    assert all("photo-" in key for key in shown(page))
    page.click("#reset")
    assert page.locator("#grid li").count() == 48


@needs_chromium
def test_pages_hold_every_sample_once(page):
    choose(page, "size", "24")
    found = shown(page)
    for _ in range(3):
        page.click("#next")
        found += shown(page)
    assert page.locator("#next").is_disabled()
    assert (len(found), len(set(found))) == (80, 80)
    page.click("#previous")
    assert page.locator("#page").inner_text() == "page 3 of 4"


def exported(page: Any) -> list[list[str]]:
    with page.expect_download() as waiting:
        page.click("#export")
    with Path(waiting.value.path()).open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@needs_chromium
def test_marks_are_exported_with_whole_keys(page, scanned):
    choose(page, "decision", "removed")
    page.click("#select-all")
    page.click("#mark-release")
    header, *lines = exported(page)
    removed = {(row["shard"], row["key"], "release") for row in decision_table(scanned).to_pylist() if not row["keep"]}
    assert header == ["shard", "key", "word"]
    assert {tuple(line) for line in lines} == removed
    assert len(lines) == len(removed)


@needs_chromium
def test_an_auditors_walk_from_the_page_to_the_clean_shards(page, scanned, tmp_path):
    """Three samples released, a whole group removed, exported, recorded: decisions, tars and the next report follow."""
    choose(page, "decision", "removed")
    search(page, "caption number")
    released = shown(page)[:3]
    for box in page.locator("#grid input[type=checkbox]").all()[:3]:
        box.check()
    page.click("#mark-release")
    page.click("#reset")
    choose(page, "decision", "kept")
    removed = shown(page)
    page.click("#select-all")
    page.click("#mark-remove")
    with (tmp_path / "decisions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(exported(page))
    copy = str(shutil.copytree(scanned, tmp_path / "scanned"))
    words = review(copy, decisions=str(tmp_path / "decisions.csv"), by="Ada", note="looked at the page")
    assert (words.released, words.removed, words.changed) == (3, len(removed), 3 + len(removed))
    assert {row["key"] for row in decision_table(copy).to_pylist() if row["keep"]} == set(released)
    assert verify(copy, deep=True).problems == ()
    audit(copy)
    page.goto(Path(copy, "audit", "report.html").as_uri())
    choose(page, "decision", "kept")
    assert set(shown(page)) == set(released)


@needs_chromium
def test_a_mark_can_be_taken_back_and_the_other_word_replaces_it(page):
    boxes = page.locator("#grid input[type=checkbox]")
    boxes.nth(0).check()
    boxes.nth(1).check()
    page.click("#mark-release")
    assert page.locator("#grid input:checked").count() == 0  # else the next mark would take them along
    boxes.nth(1).check()
    page.click("#mark-remove")
    assert sorted(line[2] for line in exported(page)[1:]) == ["release", "remove"]
    boxes.nth(0).check()
    boxes.nth(1).check()
    page.click("#mark-none")
    assert page.locator("#export").is_disabled()
    assert page.locator(".badge.marked").count() == 0


@needs_chromium
def test_a_campaign_can_be_shown_and_selected(page):
    buttons = page.locator("[data-select]")
    if not buttons.count():
        pytest.skip("the tiny encoder found no campaign here")
    buttons.first.click()
    size = page.locator("#count").inner_text().split(" of ")[0]
    assert f"{size} selected" in page.locator("#count").inner_text()


# ---------------------------------------------------------------- for everybody


@needs_chromium
def test_samples_are_opened_and_left_by_keyboard(page):
    page.locator("#grid .pair").first.focus()
    page.keyboard.press("Enter")
    first = page.locator("#detail-title").inner_text()
    assert page.locator("#detail").is_visible()
    page.keyboard.press("ArrowRight")
    assert page.locator("#detail-title").inner_text() != first
    page.keyboard.press("ArrowLeft")
    assert page.locator("#detail-title").inner_text() == first
    page.keyboard.press("Escape")
    assert not page.locator("#detail").is_visible()


@needs_chromium
def test_everything_that_can_be_used_has_a_name(page):
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, select, input, canvas, dialog, svg, a, section")]
        .filter((e) => !(e.getAttribute("aria-label") || e.getAttribute("aria-labelledby") || e.textContent.trim() || e.labels?.length))
        .map((e) => e.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
    assert page.evaluate("[...document.images].filter((image) => !image.hasAttribute('alt')).length") == 0
    assert page.locator("h1").count() == 1


@needs_chromium
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_screen(page, width, tmp_path):
    page.set_viewport_size({"width": width, "height": 700})
    page.screenshot(path=tmp_path / f"{width}.png")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@needs_chromium
def test_light_and_dark(page, tmp_path):
    grounds = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.screenshot(path=tmp_path / f"{scheme}.png")
    assert grounds == ["rgb(246, 247, 249)", "rgb(18, 22, 29)"]


# ---------------------------------------------------------------- hostile texts


@needs_chromium
def test_hostile_texts_are_shown_as_texts(page):
    search(page, "b-hostile")
    keys = shown(page)
    assert MARKUP in keys
    assert any(key.startswith("long" * 30) and key.endswith("…") for key in keys)
    assert page.locator("main script, main b, main svg:not(.histogram), main img[src=x]").count() == 0
    assert page.evaluate("document.title") == "What was flagged in scanned"
    bidi = page.locator("#grid bdi").evaluate_all(
        "all => all.every((e) => getComputedStyle(e).unicodeBidi === 'isolate')"
    )
    assert bidi


@needs_chromium
def test_a_key_of_64_kib_is_exported_whole(page):
    search(page, "longlong")
    page.click("#select-all")
    page.click("#mark-remove")
    assert [len(line[1]) for line in exported(page)[1:]] == [1 << 16]


def test_hostile_texts_do_not_reach_the_source_of_the_page(scanned):
    source = Path(scanned, "audit", "report.html").read_text()
    assert "onerror=window" not in source.replace("\\u003cimg src=x onerror=window", "")
    assert source.count("<script") == source.count("</script>") == 3  # data, one block of images, our own
    assert "\x1b" not in source
    assert "\u202e" not in source


def test_hostile_texts_do_not_reach_the_terminal(scanned):
    text = audit(scanned, top=0).text
    for row in decision_table(scanned).to_pylist():
        if row["shard"] == "b-hostile":
            text += why(scanned, row["key"])
    assert not set("\x1b\x07\u202e\u202c") & set(text)
    assert max(map(len, text.splitlines())) < 700
