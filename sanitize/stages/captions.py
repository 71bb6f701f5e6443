"""The caption of a sample, from its .txt or .json member; a reason when there is none. Hostile like the images."""

import json

from sanitize.errors import ConfigError

MAX_CAPTION_BYTES = 1 << 16  # 64 KiB, of the member that holds the caption


def split_member(member: str, setting: str = "caption_member", usual: str = "txt") -> tuple[str, str]:
    """ "txt" → ("txt", ""); "json:caption" → ("json", "caption"): extension and field."""
    extension, _, field = member.partition(":")
    extension = extension.lower().lstrip(".")
    if member and (not extension or (extension.endswith("json") != bool(field))):
        name = setting.removesuffix("_member")
        raise ConfigError(
            f"{setting}: {member!r} is not an extension such as {usual}, or json:<field> such as json:{name}."
        )
    return extension, field


def caption_text(data: bytes, field: str) -> tuple[str, str]:
    """(text, "") or ("", why there is none). Of a JSON list the first entry counts."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return "", f"the caption is not UTF-8 (byte {error.start})"
    if field:
        try:
            values = json.loads(text)
        except (ValueError, RecursionError):
            return "", "the caption's JSON cannot be read"
        found = values.get(field) if isinstance(values, dict) else None
        found = found[0] if isinstance(found, list) and found else found
        if not isinstance(found, str):
            return "", f"the JSON has no text in its field {field!r}"
        text = found
    text = text.encode("utf-8", "replace").decode("utf-8").strip()  # JSON can smuggle in lone surrogates
    return (text, "") if text else ("", "the caption is empty")
