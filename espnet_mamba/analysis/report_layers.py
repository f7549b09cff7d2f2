"""The section on layers: all measures on one page, where each peaks, then every measure with figure and numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from espnet_mamba.analysis.layer_plots import figure_name
from espnet_mamba.analysis.overview import overview_kinds, peaks_of, plot_overview
from espnet_mamba.analysis.panels import CHANCE
from espnet_mamba.analysis.report_blocks import Block, Figure, Gallery, Heading, Missing, Section, Table, Text, number
from espnet_mamba.analysis.report_inputs import Results
from espnet_mamba.analysis.table import LayerValue, read_table_csv
from espnet_mamba.analysis.titles import caption_of, flag_in_words, heading, title_of, unit_of

_TABLES = (
    ("mutual_information", "mutual information per layer", "stage 11 (analysis)"),
    ("purity", "phone purity per layer", "stage 11 (analysis), which needs phones.ctm in the data"),
    ("layers", "similarity, probes, reconstruction and information of codes per layer", "stage 11 (analysis)"),
)
HOW_TO_READ = (
    "Each panel is one measure over layers, each line one system with its 95 % interval over utterances. A value says "
    "something where its band lies above its own dashed line, which the same procedure gives on shuffled data, and two "
    "systems differ where their bands part; a value near the dotted ceiling is the most that could have been seen. "
    "Where the random-weight system shows the same shape, the shape is the architecture's and was not learned. Panels "
    "on grey hold the published protocol as it ran, which is no bound: compare it with its dashed line only."
)
PEAK_RULE = (
    "The layer where each measure is highest, and the layers that lie within the interval of that value: where they "
    "are many, the data do not say which layer is best."
)
_ONE_ESTIMATOR = ("phone_accuracy", "speaker_accuracy", "pwcca", "cca_mean")
_ASIDE = ("cca_mean", "cka", "discrete_information_share", "mutual_information_bias")


@dataclass(frozen=True)
class _Family:
    """Measures that share a heading; all those named, in this order."""

    title: str
    measures: tuple[str, ...]


_FAMILIES = (
    _Family("Canonical correlation and alignment", ("pwcca", "cka_debiased", "cca_mean", "cka")),
    _Family("Reconstruction of log-mel", ("reconstruction",)),
    _Family("Linear probes", ("phone_accuracy", "speaker_accuracy")),
    _Family("Information of k-means codes", ("discrete_information", "discrete_information_share")),
)


def layers_section(results: Results, out_dir: Path) -> Section:
    """Return overview, peaks, and every measure; the overview's figure goes to ``out_dir``."""
    folder = results.paths.analysis_dir
    tables = {name: folder / f"{name}.csv" for name, _, _ in _TABLES} if folder else {}
    missing: list[Block] = [
        Missing(what, stage) for name, what, stage in _TABLES if not (folder and tables[name].is_file())
    ]
    rows = {name: read_table_csv(path) for name, path in tables.items() if path.is_file()}
    every = [row for name in ("layers", "mutual_information", "purity") for row in rows.get(name, [])]
    blocks = _overview(every, out_dir)
    for name, title in (("mutual_information", "Mutual information"), ("purity", "Phone purity")):
        if rows.get(name):
            blocks += _page(title, rows[name], tables[name])
    blocks += _families(rows.get("layers", []), tables.get("layers"))
    return Section("Layers", missing + blocks)


def _overview(rows: Sequence[LayerValue], out_dir: Path) -> list[Block]:
    kinds = overview_kinds(rows)
    if not kinds:
        return []
    systems = list(dict.fromkeys(row.system for row in rows))
    figure = plot_overview(kinds, out_dir / "layers_overview", systems)[0]
    caption = "All measures per layer. The numbers are in layers_overview.csv; each measure's own figure is below."
    return [Text(HOW_TO_READ), Figure(figure, caption), Text(PEAK_RULE), _peaks(kinds)]


def _peaks(kinds: Sequence[Sequence[LayerValue]]) -> Table:
    cells = []
    for rows in kinds:
        first = rows[0]
        head = heading(first.measure, first.reference, short=True)
        if first.measure not in _ONE_ESTIMATOR:
            head += f": {title_of(first.estimator, short=True).partition(chr(10))[0]}"
        head += f" ({unit_of(first.unit)})" if first.unit else ""
        for peak in peaks_of(rows):
            row = peak.row
            within = "all" if len(peak.within) == peak.num_layers else _ranges(peak.within)
            within = within if peak.num_layers > 1 else "–"
            numbers = [number(row.value, row.low, row.high), number(row.null), number(row.ceiling)]
            cells.append([head, row.system, row.layer_name, within, *numbers, flag_in_words(row.flag)])
            head = ""
    header = ["measure", "system", "peak", "layers within", "value", "null", "ceiling", "flag"]
    return Table(header, cells, left=(0, 1, 2, 3, 7))


def _ranges(layers: Sequence[int]) -> str:
    """Return numbers with runs joined: 1, 2, 3, 5 -> ``1–3, 5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _page(title: str, rows: Sequence[LayerValue], table: Path) -> list[Block]:
    """Return a table's own figure, one page per reference where there are such, and its rows."""
    measures = list(dict.fromkeys(row.measure for row in rows))
    blocks: list[Block] = [Heading(title)]
    captions = " ".join(filter(None, (caption_of(measure) for measure in measures if measure != "used_clusters")))
    if (figure := table.with_suffix(".svg")).is_file():
        blocks.append(Figure(figure, captions))
    for reference in dict.fromkeys(row.reference for row in rows):
        page = table.with_name(f"{table.stem}_{reference}.svg")
        if page.is_file():
            caption = f"Every estimator with {title_of(reference)}."
            blocks.append(Gallery([Figure(page, caption)], f"every estimator with {title_of(reference)}"))
    kept = [row for row in rows if row.reference != "phones_and_silence"]
    return [*blocks, _values(kept, f"all values: {title.lower()} per layer", table)]


def _families(rows: Sequence[LayerValue], table: Path | None) -> list[Block]:
    if not rows or table is None:
        return []
    blocks: list[Block] = []
    known = {measure for family in _FAMILIES for measure in family.measures}
    rest = tuple(dict.fromkeys(row.measure for row in rows if row.measure not in known))
    for family in (*_FAMILIES, _Family("Other measures", rest)):
        own = [row for measure in family.measures for row in rows if row.measure == measure]
        if not own:
            continue
        blocks.append(Heading(family.title))
        aside: list[Figure] = []
        for measure in dict.fromkeys(row.measure for row in own):
            chief, others = _figures([row for row in own if row.measure == measure], table.parent / "layers")
            blocks += [Text(caption_of(measure)), Gallery(chief)] if chief else []
            aside += others
        blocks += [Gallery(aside, "further figures")] if aside else []
        blocks.append(_values(own, f"all values: {family.title[:1].lower()}{family.title[1:]}", table))
    return blocks


def _figures(rows: Sequence[LayerValue], folder: Path) -> tuple[list[Figure], list[Figure]]:
    """Return a figure per kind of value that stage 11 drew: those to look at first, and the others."""
    chief, aside = [], []
    for measure, estimator, reference in dict.fromkeys((r.measure, r.estimator, r.reference) for r in rows):
        path = folder / f"{figure_name(measure, estimator, reference)}.svg"
        if estimator == CHANCE or not path.is_file():
            continue
        head = heading(measure, reference)
        caption = f"{head[:1].upper()}{head[1:]}: {title_of(estimator)}."
        if measure in _ASIDE:
            aside.append(Figure(path, f"{caption} {caption_of(measure)}"))
        else:
            (aside if estimator.endswith("plugin") else chief).append(Figure(path, caption))
    return chief, aside


def _values(rows: Sequence[LayerValue], title: str, source: Path) -> Table:
    cells = []
    for row in rows:
        digits = 0 if row.unit == "clusters" else 3
        values = [number(row.value, row.low, row.high, digits), number(row.null, digits=digits)]
        values += [number(row.ceiling, digits=digits), unit_of(row.unit), row.flag]
        cells.append([row.system, row.layer_name, row.measure.replace("_", " "), row.estimator, row.reference, *values])
    header = ["system", "layer", "measure", "estimator", "against", "value", "null", "ceiling", "unit", "flag"]
    return Table(header, cells, left=(0, 1, 2, 3, 4, 8, 9), folded=title, source=source)
