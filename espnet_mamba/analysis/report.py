"""The report: RESULTS.md and one self-contained report.html from whatever the stages left."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from espnet_mamba.analysis.report_blocks import (
    Block,
    Code,
    Figure,
    Gallery,
    Heading,
    Missing,
    Section,
    Table,
    Text,
)
from espnet_mamba.analysis.report_html import render_html
from espnet_mamba.analysis.report_inputs import ReportPaths, read_results
from espnet_mamba.analysis.report_sections import build_sections
from espnet_mamba.data.files import write_text


def write_report(tag: str, paths: ReportPaths, out_dir: str | Path) -> list[str]:
    """Write ``RESULTS.md`` and ``report.html`` to ``out_dir``; return the sentences that name what is missing."""
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    sections = build_sections(read_results(tag, paths), out_dir)
    title = f"Results: {tag}"
    write_text(out_dir / "RESULTS.md", render_markdown(title, sections, out_dir))
    write_text(out_dir / "report.html", render_html(title, sections))
    return [block.text for section in sections for block in section.blocks if isinstance(block, Missing)]


def render_markdown(title: str, sections: Sequence[Section], out_dir: Path) -> str:
    """Return the report as Markdown; figures are links relative to ``out_dir``."""
    parts = [f"# {title}\n"]
    for section in sections:
        parts.append(f"## {section.title}\n")
        parts += [_block(block, out_dir) for block in section.blocks]
    return "\n".join(parts)


def _block(block: Block, out_dir: Path) -> str:
    if isinstance(block, Heading):
        return f"### {block.text}\n"
    if isinstance(block, Table):
        return _link(block, out_dir) if block.folded and block.source else _table(block)
    if isinstance(block, Gallery):
        return "\n".join(_block(figure, out_dir) for figure in block.figures)
    if isinstance(block, Figure):
        return f"![{block.caption}]({os.path.relpath(block.path, out_dir)})\n"
    if isinstance(block, Code):
        return f"`{block.title}`\n\n```yaml\n{block.text}\n```\n"
    assert isinstance(block, (Text, Missing))
    return f"*{block.text}*\n" if isinstance(block, Missing) else f"{block.text}\n"


def _link(table: Table, out_dir: Path) -> str:
    """A page of hundreds of rows is the page's to fold; here the file is named."""
    assert table.source is not None
    target = os.path.relpath(table.source, out_dir)
    return f"{table.folded[:1].upper()}{table.folded[1:]}: [{table.source.name}]({target})\n"


def _table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join("---" if i in table.left else "--:" for i in range(len(table.header))) + "|"
    return "\n".join([line(table.header), rule, *map(line, table.rows)]) + "\n"
