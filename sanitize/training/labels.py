"""The class of a sample, from its .cls or .json member: an integer from 0, or a reason why there is none."""

import json

from sanitize.stages.captions import split_member

MAX_LABEL_BYTES = 1 << 16


def split_label_member(label_member: str) -> tuple[str, str]:
    """ "cls" → ("cls", ""); "json:label" → ("json", "label"): extension and field."""
    return split_member(label_member, setting="label_member", usual="cls")


def label_of(data: bytes, field: str) -> tuple[int, str]:
    """(label, "") or (-1, why there is none). Text is an integer alone; of a JSON member the field holds an integer."""
    if len(data) > MAX_LABEL_BYTES:
        return -1, f"its file has more than {MAX_LABEL_BYTES} bytes"
    text = data.decode("utf-8", "backslashreplace").strip()
    value: object = text
    if field:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            return -1, "its JSON cannot be read"
        value = values.get(field) if isinstance(values, dict) else None
    elif text.isascii() and text.isdecimal() and len(text) <= 9:
        value = int(text)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9:
        return value, ""
    return -1, f"it is {str(value)[:40]!r}"
