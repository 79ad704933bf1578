"""Tables and pictures as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raco_optim.cli.errors import UsageError
from raco_optim.cli.files import check_writable
from raco_optim.cli.tables import Table

_MARK = '<meta name="generator" content="raco-optim">'
_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.8rem; border-bottom: 1px solid #8885; text-align: right; }
th:first-child, td:first-child { text-align: left; }
td { white-space: nowrap; } .wrapped td { white-space: pre-wrap; vertical-align: top; }
.wrapped th, .wrapped td { text-align: left; }
img { max-width: 100%; background: white; }
p { max-width: 50rem; } .note { font-size: 0.85rem; opacity: 0.8; }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG picture with a title and a caption, which is also its alternative text."""

    title: str
    png: bytes
    text: str


def check_page(path: Path, option: str) -> None:
    """Raises `UsageError` unless a page can be written at `path`; only pages are replaced."""
    check_writable(path, option)
    if path.exists() and path.stat().st_size and _MARK.encode() not in path.read_bytes()[:1000]:
        raise UsageError(
            f"`{option}` must be a new file or a page that raco-optim wrote; got {path}, another "
            f"file. Choose another name."
        )


def page(title: str, summary: str, parts: Sequence[Table | Picture]) -> str:
    """Returns an HTML page; all text is escaped, nothing is fetched, no script runs."""
    body = "\n".join(_table(p) if isinstance(p, Table) else _picture(p) for p in parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{_MARK}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(summary)}</p>
{body}
</body>
</html>
"""


def _table(table: Table) -> str:
    head = _row("th", table.header)
    rows = "\n".join(_row("td", row) for row in table.rows)
    kind = ' class="wrapped"' if table.wrapped else ""
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return (
        f'<h2>{html.escape(table.title)}</h2>\n<div class="wide"><table{kind}>\n'
        f"<thead>{head}</thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>\n{note}"
    )


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    text = html.escape(picture.text)
    return (
        f'<h2>{html.escape(picture.title)}</h2>\n<img alt="{text}" '
        f'src="data:image/png;base64,{data}">\n<p class="note">{text}</p>'
    )
