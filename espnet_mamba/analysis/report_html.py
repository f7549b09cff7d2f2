"""The report as one HTML file that needs nothing else: no script, no request; figures are embedded as data URIs."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence

from espnet_mamba.analysis.report_blocks import Block, Code, Figure, Gallery, Heading, Missing, Section, Table, Text

_CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d5dae0; --soft: #f4f6f8; --mark: #8a4b00; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e7eb; --paper: #15181c; --line: #3a4149; --soft: #1f242a; --mark: #f0b060; }
}
body { margin: 0 auto; max-width: 1100px; padding: 1.5rem; color: var(--ink); background: var(--paper);
       font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem;
     border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .4rem; }
nav a { margin-right: 1rem; color: inherit; } p { max-width: 75ch; }
.scroll { overflow-x: auto; max-height: 32rem; overflow-y: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { background: var(--soft); position: sticky; top: 0; } .left { text-align: left; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line); }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 0 1rem; }
details { margin: .6rem 0; } summary { cursor: pointer; }
figcaption { font-size: .87rem; max-width: 75ch; } .missing { color: var(--mark); }
pre { background: var(--soft); padding: .7rem; overflow-x: auto; font-size: .82rem; } code { font-size: .85em; }
"""


def render_html(title: str, sections: Sequence[Section]) -> str:
    """Return the whole page."""
    links = "".join(f'<a href="#{_anchor(s.title)}">{html.escape(s.title)}</a>' for s in sections)
    body = "".join(
        f'<section id="{_anchor(s.title)}"><h2>{html.escape(s.title)}</h2>{"".join(map(_block, s.blocks))}</section>\n'
        for s in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_CSS}</style></head>\n<body><h1>{html.escape(title)}</h1><nav>{links}</nav>\n{body}</body></html>\n"
    )


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _block(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h3>{html.escape(block.text)}</h3>"
    if isinstance(block, Text):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Missing):
        return f'<p class="missing">{html.escape(block.text)}</p>'
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Code):
        return (
            f"<details open><summary>{html.escape(block.title)}</summary><pre>{html.escape(block.text)}</pre></details>"
        )
    return _gallery(block) if isinstance(block, Gallery) else _figure(block)


def _gallery(gallery: Gallery) -> str:
    shown = f'<div class="gallery">{"".join(map(_figure, gallery.figures))}</div>'
    return _fold(gallery.folded, shown)


def _fold(name: str, shown: str) -> str:
    return f"<details><summary>{html.escape(name)}</summary>{shown}</details>" if name else shown


def _table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(_cell(text, tag, i in table.left) for i, text in enumerate(cells)) + "</tr>"

    head = row(table.header, "th")
    body = "".join(row(cells, "td") for cells in table.rows)
    shown = f'<div class="scroll"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'
    return _fold(table.folded, shown)


def _cell(text: str, tag: str, is_left: bool) -> str:
    shown = f"<code>{html.escape(text[1:-1])}</code>" if re.fullmatch(r"`.*`", text, re.DOTALL) else html.escape(text)
    return f'<{tag} class="left">{shown}</{tag}>' if is_left else f"<{tag}>{shown}</{tag}>"


def _figure(figure: Figure) -> str:
    # An image element keeps the ids of one SVG apart from those of another, which inline SVG would mix.
    data = base64.b64encode(figure.path.read_bytes()).decode("ascii")
    caption = html.escape(figure.caption)
    source = f"data:image/svg+xml;base64,{data}"
    return f'<figure><img alt="{caption}" src="{source}"><figcaption>{caption}</figcaption></figure>'
