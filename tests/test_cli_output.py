"""Keys, captions and names come from strangers: on a terminal they are text and nothing else."""

import json
import logging

import pytest
from builders import KEEP_ALL, image_members, write_lines, write_tar

from sanitize.cli_output import LONGEST, TerminalFormatter, for_terminal
from sanitize.commands.scan import scan

HOSTILE = {
    "clears the screen": ("\x1b[2Ja", "\\x1b[2Ja"),
    "C1 control": ("\x9b2Ja", "\\x9b2Ja"),
    "turns the direction": ("a\u202eb\u2066c\u200fd", "a\\u202eb\\u2066c\\u200fd"),
    "carriage return and bell": ("fine\rerror\x07", "fine\\rerror\\x07"),
    "line separator": ("a\u2028b", "a\\u2028b"),
    "no character": ("a\udcff", "a\\udcff"),
    "64 KiB": ("k" * 65536, "k" * LONGEST + "... (65536 characters)"),
    "ours": ("one\n\ttwo \u00e9 \u4e2d \U0001f600", "one\n\ttwo \u00e9 \u4e2d \U0001f600"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_terminal_is_given_text_and_no_orders(case):
    text, shown = HOSTILE[case]
    assert for_terminal(text) == shown
    record = logging.LogRecord("a", logging.INFO, "", 0, "%s", (text,), None)
    assert TerminalFormatter("%(message)s").format(record) == shown


def test_every_command_that_names_samples_shows_hostile_keys_as_text(sanitize, scan_config, tmp_path):
    hostile = ["\u200fx\u061c", "\x1b]0;owned\x07y", "l" * 3000]
    write_tar(tmp_path / "in" / "a.tar", image_members({key: n for n, key in enumerate(hostile)}), kind=2)
    scan(scan_config(tmp_path / "in", policy=KEEP_ALL))
    write_lines(tmp_path / "keys.txt", ["\x1b[2Jnobody\u200f" + "z" * 70_000])
    for arguments in (
        ("audit", "scanned", "--top", "0"),
        ("review", "scanned", "--remove", "keys.txt", "--by", "Ada"),
        ("audit", "scanned", "--top", "0", "--json"),
    ):
        _, output = sanitize(*arguments)
        assert not set(output) & {"\x1b", "\x07", "\u200f", "\u061c", "\r"}, arguments
        assert "--json" in arguments or max(map(len, output.splitlines())) <= LONGEST + 30
    assert "\u200fx\u061c" in json.loads(output)["text"]
