"""The page: one HTML file with everything in it, no script, no network.

Light or dark as the reader's device asks; one column on a phone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import count

from fomoe_flwr.report.style import Panel, to_svg

_CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f7f9; --ink: #1b1b1b;
  --muted: #6a6f76; --grid: #d9dce1; --good: #006b4b; --bad: #b3261e; --series-0: #0072b2;
  --series-1: #c75300; --series-2: #00805f; --series-3: #b0588a; --series-4: #b98300; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --card: #1d2025; --ink: #e8eaed;
  --muted: #9aa0a8; --grid: #3a3f47; --good: #5fd3a5; --bad: #ff8a80; --series-0: #58b4e8;
  --series-1: #ff9a4d; --series-2: #3fc79a; --series-3: #e59ac4; --series-4: #f0c04d; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 48rem; } a { color: var(--series-0); }
.status { font-size: .85rem; padding: .1rem .55rem; border: 1px solid; border-radius: 1rem;
  white-space: nowrap; vertical-align: middle; }
.completed { color: var(--good); } .failed { color: var(--bad); } .skipped { color: var(--muted); }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem;
  margin: 1rem 0; }
.facts div { background: var(--card); border-radius: .5rem; padding: .6rem .8rem; }
.facts dt { color: var(--muted); font-size: .8rem; } .facts dd { margin: 0; font-size: 1.15rem;
  font-variant-numeric: tabular-nums; }
.panels { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20.5rem), 1fr)); }
figure { margin: 0; background: var(--card); border-radius: .5rem; padding: .7rem; min-width: 0; }
figure h3 { font-size: .95rem; margin: 0 0 .3rem; }
figure svg { display: block; width: 100%; max-width: 34rem; height: auto; margin: 0 auto; }
figcaption { color: var(--muted); font-size: .8rem; line-height: 1.35; margin-top: .4rem; }
.wide { overflow-x: auto; background: var(--card); border-radius: .5rem; padding: .4rem; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; } tr:last-child td { border-bottom: 0; }
td.text { text-align: left; white-space: normal; min-width: 12rem; }
pre { background: var(--card); border-radius: .5rem; padding: .8rem; overflow-x: auto;
  font-size: .8rem; line-height: 1.4; } pre.prose { white-space: pre-wrap; }
summary { cursor: pointer; font-weight: 600; padding: .4rem 0; }
footer { color: var(--muted); font-size: .8rem; margin: 2rem 0 1rem; overflow-wrap: anywhere; }
"""


class Page:
    """A page that is put together part by part; everything given as text is escaped."""

    def __init__(self, title: str, status: str, refresh_seconds: int | None = None) -> None:
        self._title, self._status = title, status
        self._refresh = refresh_seconds
        self._parts: list[str] = []
        self._names = count(1)

    def facts(self, facts: Mapping[str, str]) -> None:
        """Add the few numbers that matter most."""
        cells = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
            for name, value in facts.items()
        )
        self._parts.append(f'<dl class="facts">{cells}</dl>')

    def heading(self, text: str) -> None:
        """Begin a part."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """Add a paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def panels(self, heading: str, text: str, panels: Sequence[Panel]) -> None:
        """Add pictures under a heading; nothing at all if there are none."""
        if not panels:
            return
        self.heading(heading)
        if text:
            self.paragraph(text)
        figures = "".join(
            f"<figure><h3>{escape(panel.title)}</h3>{to_svg(panel, f'p{next(self._names)}')}"
            f"<figcaption>{escape(panel.caption)}</figcaption></figure>"
            for panel in panels
        )
        self._parts.append(f'<div class="panels">{figures}</div>')

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[str]], links: Sequence[str] = ()
    ) -> None:
        """Add a table; `links` are where the first cells lead to, empty for nowhere."""
        head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
        body = []
        for number, row in enumerate(rows):
            cells = [f"<td>{escape(cell)}</td>" for cell in row]
            if number < len(links) and links[number]:
                target = escape(links[number], quote=True)
                cells[0] = f'<td><a href="{target}">{escape(row[0])}</a></td>'
            body.append(f"<tr>{''.join(cells)}</tr>")
        # Reached by keyboard, because it may scroll.
        self._parts.append(
            f'<div class="wide" tabindex="0" role="region" aria-label="table"><table><thead><tr>'
            f"{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        )

    def text(self, text: str, prose: bool = False) -> None:
        """Add text as it is, in a fixed pitch."""
        kind = ' class="prose"' if prose else ""
        self._parts.append(f'<pre{kind} tabindex="0">{escape(text)}</pre>')

    def folded(self, title: str, text: str) -> None:
        """Add long text that is opened by a click."""
        self._parts.append(
            f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"
        )

    def html(self, footer: str) -> str:
        """Return the whole page."""
        again = f'<meta http-equiv="refresh" content="{self._refresh}">' if self._refresh else ""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            # Without one, browsers ask the server for /favicon.ico.
            f'<link rel="icon" href="data:,">{again}<title>{escape(self._title)}</title>'
            f"<style>{_CSS}</style></head><body><main><h1>{escape(self._title)} "
            f'<span class="status {escape(self._status, quote=True)}">{escape(self._status)}'
            f"</span></h1>{''.join(self._parts)}</main><footer>{escape(footer)}</footer>"
            "</body></html>\n"
        )
