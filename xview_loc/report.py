"""Self-contained HTML pages with text, tables and matplotlib figures."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from matplotlib.figure import Figure

from xview_loc.errors import escaped
from xview_loc.files import write_whole

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #1b1f24 }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2rem }
h1, h2, p, figcaption, td { overflow-wrap: anywhere }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #d0d7de; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% } figure { margin: 1rem 0 } figcaption { color: #57606a; font-size: .9rem }
"""


def finite(values: Any) -> Any:
    """Replace numbers that are not finite, which JSON lacks, by None in nested dictionaries and lists."""
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file, cut to what is drawn."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
    return buffer.getvalue()


def _shown(text: str) -> str:
    return html.escape(escaped(text))


class Page:
    """An HTML page, built from top to bottom."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts: list[str] = [f"<h1>{_shown(title)}</h1>"]

    def heading(self, text: str) -> None:
        """Add a section's heading."""
        self._parts.append(f"<h2>{_shown(text)}</h2>")

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{_shown(text)}</p>")

    def link(self, text: str, target: str) -> None:
        """Add a paragraph with a link to another file, relative to the page."""
        self._parts.append(f'<p><a href="{html.escape(quote(target))}">{_shown(text)}</a></p>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table; the first column holds the names of the rows."""
        lines = ['<div class="wide"><table>']
        for tag, cells in [("th", header), *(("td", row) for row in rows)]:
            lines.append("<tr>" + "".join(f"<{tag}>{_shown(c)}</{tag}>" for c in cells) + "</tr>")
        self._parts.append("".join([*lines, "</table></div>"]))

    def figure(self, figure: Figure, caption: str) -> None:
        """Add a figure with its caption."""
        data = base64.b64encode(png(figure)).decode()
        text = _shown(caption)
        self._parts.append(
            f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
            f"<figcaption>{text}</figcaption></figure>"
        )

    def write(self, path: Path) -> None:
        """Write the page as one file."""
        head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        head += f"<title>{_shown(self._title)}</title><style>{_STYLE}</style>"
        body = "\n".join(self._parts)
        page = f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'
        write_whole(path, page.encode())
