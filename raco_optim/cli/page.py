"""Tables and pictures -> one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

from raco_optim.cli.tables import Table

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.8rem; border-bottom: 1px solid #8885; text-align: right; }
th:first-child, td:first-child { text-align: left; }
td { white-space: nowrap; } .names td { white-space: normal; text-align: left; }
.names th { text-align: left; }
img { max-width: 100%; background: white; }
p { max-width: 50rem; } .note { font-size: 0.85rem; opacity: 0.8; }
"""


@dataclass(frozen=True)
class Picture:
    """A picture with what it shows.

    Attributes:
        title: Heading.
        png: The PNG file.
        text: What it shows, for who does not see it and under it for who does.

    Example:
        >>> from raco_optim.cli.page import Picture
        >>> Picture("Front", b"", "Nothing.").title
        'Front'
    """

    title: str
    png: bytes
    text: str


def page(title: str, summary: str, parts: Sequence[Table | Picture]) -> str:
    """Returns an HTML page. All that is shown is escaped; nothing is fetched and no script runs.

    Args:
        title: Heading of the page.
        summary: A paragraph under it.
        parts: What follows, in this order.

    Example:
        >>> from raco_optim.cli.page import page
        >>> "&lt;b&gt;" in page("Report on <b>", "Short.", [])
        True
    """
    body = "\n".join(_table(p) if isinstance(p, Table) else _picture(p) for p in parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
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
    kind = ' class="names"' if list(table.header) == ["name", "value"] else ""
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
