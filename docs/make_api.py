"""Write the Python API as HTML pages, from the docstrings, and check that every link in them leads somewhere.

    python docs/make_api.py build/api

Needs the extra `docs`. Exits with 1 if a link is broken.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import sys
import warnings
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import pdoc  # noqa: E402

import jsfdd  # noqa: E402
from jsfdd import config  # noqa: E402


class _Page(HTMLParser):
    """Collects the links and the ids of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found["id"]} if found.get("id") else set()
        self.links += [unescape(found["href"])] if tag == "a" and found.get("href") else []


def broken_links(folder: Path) -> list[str]:
    """ "page: link" of every link that leads to no page of the folder, or to no id in it; links to the web are not followed."""
    pages = {path.resolve(): _Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if target not in pages or parts.fragment and unquote(parts.fragment) not in pages[target].ids:
                broken.append(f"{path.relative_to(folder.resolve())}: {link}")
    return broken


def _drop_what_named_tuples_say_of_themselves() -> None:
    """ "Alias for field number 0" and the like, in every module of jsfdd."""
    for found in pkgutil.walk_packages(jsfdd.__path__, "jsfdd."):
        for value in vars(importlib.import_module(found.name)).values():
            if isinstance(value, type) and issubclass(value, tuple) and hasattr(value, "_fields"):
                value.__new__.__doc__ = ""
                for name in value._fields:
                    getattr(value, name).__doc__ = ""


def main(folder: Path) -> int:
    # Shapes such as Float[Array, "B T"] are no expressions, and pdoc shows them as they are written.
    warnings.filterwarnings("ignore", message=re.escape("Error parsing type annotation"))
    config._Options.__doc__ += "\n\n@public"  # all configs link to what they inherit from it
    _drop_what_named_tuples_say_of_themselves()
    pdoc.render.configure(docformat="google", footer_text="jsfdd")
    pdoc.pdoc("jsfdd", output_directory=folder)
    broken = broken_links(folder)
    print("\n".join(broken), file=sys.stderr) if broken else print(f"the Python API: {folder / 'index.html'}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
