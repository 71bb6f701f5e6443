"""Template + plain values → one self-contained HTML file.

Every text goes through autoescape or through `json_text`; scripts and styles are our own files, named by their hash in the page's
content security policy, so that nothing else would run even if it got in.
"""

import base64
import functools
import hashlib
import json
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

_FILES = resources.files("sanitize.pages")


def render(template: str, **values: Any) -> bytes:
    """One of sanitize/pages/*.html.j2. Values are plain, or `Markup` that this package made."""
    return _environment().get_template(f"{template}.html.j2").render(**values).encode()


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("sanitize", "pages"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.globals.update(inline=inline, csp_hash=csp_hash, json_text=json_text)
    return environment


def inline(name: str) -> Markup:
    """The text of one of our own .css and .js files."""
    return Markup(_text(name))


def csp_hash(name: str) -> str:
    """What allows this file, and no other text, as inline script or style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(_text(name).encode()).digest()).decode()


def json_text(value: Any) -> Markup:
    """JSON for a <script type="application/json">: with no character that could end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def encoded(webp: bytes) -> str:
    return base64.b64encode(webp).decode()


def data_uri(webp: bytes) -> str:
    return f"data:image/webp;base64,{encoded(webp)}"


@functools.cache
def _text(name: str) -> str:
    return (_FILES / name).read_text(encoding="utf-8")
