"""How Sphinx makes the pages: `make docs`.  The reference of keys, laws and functions is generated from the code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import dbscale
from dbscale.laws import FORMS

project = "dbscale"
author = "The dbscale authors"
release = dbscale.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "dbscale"
myst_heading_anchors = 3
# Links to files outside of docs/ are checked by tests/test_readme.py, which knows the whole checkout.
suppress_warnings = ["myst.xref_missing", "toc.not_included"]
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "undoc-members": True, "exclude-members": "model_config, model_post_init"}


def write_laws(_app: Any) -> None:
    """docs/reference/laws.md: every law with its equation, parameters and source, as the code declares them."""
    lines = [
        "# Laws",
        "",
        "Every law that `--law` and `fit_law` take; `--law auto` averages those that the columns allow.",
        "",
    ]
    for name, form in sorted(FORMS.items()):
        lines += [f"## {name}", "", f"`{form.equation}`", "", inspect.cleandoc(form.source), ""]
        lines += [f"- variables: {', '.join(f'{each.name} ({each.symbol})' for each in form.variables)}", ""]
    path = Path(__file__).parent / "reference" / "laws.md"
    text = "\n".join(lines)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def as_markdown(_app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Docstrings quote code as Markdown does; the few sections that they have become lists.

    Not napoleon, which takes `key: value` in an attribute's docstring for a type.
    """
    text = re.sub(r"(?<![`:])`([^`]+)`(?!`)", r"``\1``", "\n".join(lines))
    out: list[str] = []
    section = ""
    for line in text.split("\n"):
        title = re.fullmatch(r"(Args|Raises|Returns):", line)
        if title:
            section = title[1]
            out += ["", f"**{section}**", ""]
        elif section and line.startswith("    "):
            is_item = section != "Returns" and not line.startswith("        ")
            out.append(f"- {line.strip()}" if is_item else f"{'' if section == 'Returns' else '  '}{line.strip()}")
        else:
            section = section if not line.strip() else ""
            out.append(line)
    lines[:] = out


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", as_markdown)
    app.connect("builder-inited", write_laws)
