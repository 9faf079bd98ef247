"""Blocks and figures as one HTML page without network or script, for light and dark, for a phone and for paper."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TYPE_CHECKING

from nsa_gen.cli.blocks import Block, Code, Heading, Table, Text

if TYPE_CHECKING:
    from nsa_gen.bench.figures import Figure

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #57606a; --rule: #d0d7de; --band: #f6f8fa;
  --c0: #0064b4; --c1: #b84a00; --c2: #00734f; --c3: #9c3a7d; --c4: #7a6000; --c5: #00788c;
  --c6: #6a4fc4; --c7: #6e7781; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1318; --ink: #e6edf3; --soft: #9da7b1; --rule: #343b43;
  --band: #171c23; --c0: #62b0ff; --c1: #ff9d57; --c2: #4cd3a0; --c3: #f08fd0; --c4: #e3c04a; --c5: #4fd0e3;
  --c6: #b29cff; --c7: #a3adb8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
h3, h4 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
nav ul { padding-left: 1.2rem; columns: 18rem; column-gap: 2rem; }
nav li { break-inside: avoid; } a { color: var(--c0); }
.scroll { overflow-x: auto; } .lines { white-space: pre-line; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal; }
caption { text-align: left; font-weight: 600; padding: .4rem 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
th { font-weight: 600; } .right { text-align: right; white-space: nowrap; }
thead th { border-bottom: 2px solid var(--soft); } tfoot td { border-top: 2px solid var(--soft); font-weight: 600; }
tbody tr:nth-child(even) { background: var(--band); }
.ok { color: var(--c2); } .fails { color: var(--c1); font-weight: 700; }
pre { overflow-x: auto; background: var(--band); padding: .6rem; }
figure { margin: 1.6rem 0; } figcaption { color: var(--soft); font-size: .875rem; margin-top: .3rem; }
.figure-title { font-weight: 600; margin: 0 0 .3rem; color: var(--ink); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: .5rem 1rem; }
.charts > div { max-width: 34rem; } .charts p { margin: 0; font-size: .875rem; }
.charts svg { width: 100%; height: auto; display: block; }
.charts svg * { stroke-linejoin: round; stroke-linecap: butt; }
@media print {
  :root { color-scheme: light; --page: #fff; --ink: #000; --soft: #444; --rule: #bbb; --band: #f4f4f4; --c0: #0064b4;
    --c1: #b84a00; --c2: #00734f; --c3: #9c3a7d; --c4: #7a6000; --c5: #00788c; --c6: #6a4fc4; --c7: #6e7781; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { max-width: none; padding: 0; font-size: 10pt; } nav { display: none; }
  .scroll { overflow: visible; } table { font-size: 7.5pt; } th, td { padding: .15rem .3rem; }
  figure, tr { break-inside: avoid; } h2, h3, caption { break-after: avoid; } thead { display: table-header-group; }
  .charts { grid-template-columns: repeat(3, 1fr); } .charts > div:only-child { grid-column: span 2; }
}
"""


def to_html(title: str, blocks: Iterable[Block | Figure]) -> str:
    """One document: `title` as its heading, a table of contents of the level-2 headings, then the blocks in order."""
    body, contents, number = [], [], 0
    for block in blocks:
        if isinstance(block, Heading):
            number += 1
            if block.level == 2:
                contents.append(f'<li><a href="#s{number}">{escape(block.text)}</a></li>')
            body.append(f'<h{block.level} id="s{number}">{escape(block.text)}</h{block.level}>')
        else:
            body.append(_block(block))
    nav = f'<nav aria-label="Contents"><ul>{"".join(contents)}</ul></nav>\n' if len(contents) > 1 else ""
    newline = "\n"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Without an icon of its own, a browser asks the server for one.
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>\n"
        f"{nav}{newline.join(body)}\n</main>\n</body>\n</html>\n"
    )


def _block(block: Block | Figure) -> str:
    match block:
        case Text():
            return _text(block.text)
        case Code():
            return f"<pre><code>{escape(block.text)}</code></pre>"
        case Table():
            return _table(block)
        case Heading():
            raise TypeError("headings are numbered by to_html")
        case _:
            return _figure(block)


def _text(text: str) -> str:
    """A paragraph; lines that begin with a dash are a list."""
    lines = text.splitlines()
    if lines and all(line.startswith("- ") for line in lines):
        return f"<ul>{''.join(f'<li>{escape(line[2:])}</li>' for line in lines)}</ul>"
    return f'<p class="lines">{escape(text)}</p>'


def _table(table: Table) -> str:
    right = [name.startswith(">") for name in table.columns]

    def cells(row: Iterable[str], tag: str, scope: str = "") -> str:
        made = []
        for text, aligned in zip(row, right, strict=True):
            classes = [*(["right"] if aligned else []), *([text] if text in ("ok", "fails") else [])]
            attribute = f' class="{" ".join(classes)}"' if classes else ""
            made.append(f"<{tag}{scope}{attribute}>{escape(text)}</{tag}>")
        return f"<tr>{''.join(made)}</tr>"

    caption = f"<caption>{escape(table.title)}</caption>" if table.title else ""
    head = cells((name.removeprefix(">") for name in table.columns), "th", ' scope="col"')
    rows = "\n".join(cells(row, "td") for row in table.rows)
    foot = f"<tfoot>{cells(table.footer, 'td')}</tfoot>" if table.footer else ""
    label = escape(table.title or "table", quote=True)
    # A box that scrolls can be reached by the keyboard, and says what it is.
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>{caption}<thead>{head}</thead>\n'
        f"<tbody>\n{rows}\n</tbody>{foot}</table></div>"
    )


def _figure(figure: Figure) -> str:
    charts = "".join(f"<div><p>{escape(heading)}</p>{chart}</div>" for heading, chart in figure.charts)
    return (
        f'<figure>\n<p class="figure-title">{escape(figure.title)}</p>\n<div class="charts">{charts}</div>\n'
        f"<figcaption>{escape(figure.caption)}</figcaption>\n</figure>"
    )
