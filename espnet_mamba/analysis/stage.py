"""The analysis stage: one pass over the audio per system, then every measure, its table and its figure."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from espnet_mamba.analysis.comparison import compare_systems
from espnet_mamba.analysis.layer_measures import LayerMeasures
from espnet_mamba.analysis.layer_plots import plot_layers
from espnet_mamba.analysis.mutual_information import held_out_rows, mine_paper_rows
from espnet_mamba.analysis.plots import plot_mutual_information, plot_purity
from espnet_mamba.analysis.purity import LayerCounts, count_layer, number_phones, phones_of_frames, purity_rows
from espnet_mamba.analysis.settings import AnalysisSettings
from espnet_mamba.analysis.statistics import DTYPES, LayerFeatures, choose_utterances, collect_features
from espnet_mamba.analysis.table import LayerValue, write_table_csv
from espnet_mamba.data.files import write_json
from espnet_mamba.data.kaldi import read_ctm
from espnet_mamba.data.manifest import Utterance, read_manifest
from espnet_mamba.targets.features import FeatureSource, open_features

NO_PHONES = "phone purity is left out: it needs {} (stage 1 writes it when phone times are known)"


def run_analysis(
    settings: AnalysisSettings,
    dump_dir: str | Path,
    sets: tuple[str, str],
    systems: Mapping[str, str],
    out_dir: str | Path,
    seed: int = 0,
    open_source: Callable[[str], FeatureSource] = open_features,
) -> None:
    """Measure ``systems`` (name -> model folder or ``logmel``) and write the tables and figures to ``out_dir``.

    ``sets`` are (train, test): k-means is fitted on the first and scored on the second, mutual information is measured
    on the second. Without phones.ctm in both sets the purity part says so and is left out. ``open_source`` opens a
    system, so that callers may bring sources that this room must not know (S3PRL's, ESPnet's).
    """
    started = time.perf_counter()
    sources = {name: open_source(spec) for name, spec in systems.items()}
    widest = max(sum(source.dims) for source in sources.values()) * (4 if settings.dtype == "float32" else 2)
    chosen = [_choose(Path(dump_dir) / name, settings, widest, seed) for name in sets]
    alignments = [Path(dump_dir) / name / "phones.ctm" for name in sets]
    missing = [path for path in alignments if not path.is_file()]
    notes = [NO_PHONES.format(missing[0])] if missing else []
    purity = None if missing else _PurityTask(alignments, settings, seed)
    information: list[LayerValue] = []
    logmel = _log_mel(settings, chosen[1])
    phones = None if purity is None else (purity.segments[1], purity.numbers)
    measures = LayerMeasures(settings, Path(dump_dir) / sets[1], chosen[1], logmel, phones, seed)
    for name, source in sources.items():
        test = collect_features(source, chosen[1], DTYPES[settings.dtype], f"{name} {sets[1]}")
        if len(source.names) > 1:
            information += _information(name, test, logmel, settings, seed)
        fit = collect_features(source, chosen[0], DTYPES[settings.dtype], f"{name} {sets[0]}")
        if purity is not None:
            purity.add(name, fit, test)
        measures.add(name, test, fit)
    notes += measures.notes
    if measures.rows:
        write_table_csv(Path(out_dir) / "layers.csv", measures.rows)
        plot_layers(measures.rows, Path(out_dir) / "layers")
    _write(Path(out_dir), information, purity, settings, seed)
    record = {"settings": asdict(settings), "systems": dict(systems), "sets": list(sets), "seed": seed, "notes": notes}
    record["num_utts"] = [len(part) for part in chosen]
    record["seconds"] = round(time.perf_counter() - started, 1)
    write_json(Path(out_dir) / "analysis.json", record)
    for note in notes:
        print(note, flush=True)
    print(
        f"analysis: {len(information)} values of mutual information in {record['seconds']} s -> {out_dir}", flush=True
    )


def _choose(folder: Path, settings: AnalysisSettings, bytes_per_frame: int, seed: int) -> Sequence[Utterance]:
    # Two sets are held at once, so each gets half of the limit.
    return choose_utterances(
        read_manifest(folder), settings.max_utterances, settings.max_memory_mb / 2, bytes_per_frame, seed
    )


def _log_mel(settings: AnalysisSettings, utterances: Sequence[Utterance]) -> LayerFeatures | None:
    if "logmel" not in settings.references:
        return None
    source: FeatureSource = open_features("logmel")
    return collect_features(source, utterances, DTYPES[settings.dtype], "logmel")


def _information(
    name: str, features: LayerFeatures, logmel: LayerFeatures | None, settings: AnalysisSettings, seed: int
) -> list[LayerValue]:
    """Both kinds of estimate with every reference: layer 0 against layers 1..N, log-mel against layers 0..N."""
    every = list(range(len(features.names)))
    references: list[tuple[str, Tensor, list[int]]] = []
    if "layer0" in settings.references:
        references.append(("layer0", features.layers[0], every[1:]))
    if logmel is not None:
        references.append(("logmel", logmel.layers[0], every))
    rows: list[LayerValue] = []
    for reference, x, layers in references:
        rows += mine_paper_rows(
            name, features, (reference, x), layers, settings.mine_paper, settings.mine_utterances, seed
        )
        rows += held_out_rows(name, features, (reference, x), layers, settings.bounds, seed)
        print(f"{name}: mutual information with {reference} done, {len(layers)} layers", flush=True)
    return rows


class _PurityTask:
    """Counts codes against phones, system by system; phones are numbered once for all."""

    def __init__(self, alignments: Sequence[Path], settings: AnalysisSettings, seed: int) -> None:
        self.segments = [read_ctm(path) for path in alignments]
        self.paths, self.settings, self.seed = alignments, settings, seed
        self.numbers = number_phones({k: v for part in self.segments for k, v in part.items()}, settings.purity.silence)
        self.counts: list[LayerCounts] = []

    def add(self, system: str, fit: LayerFeatures, test: LayerFeatures) -> None:
        """Count every layer of a system for every K."""
        pair = [
            (features, phones_of_frames(features, segments, self.numbers, str(path)))
            for features, segments, path in zip((fit, test), self.segments, self.paths, strict=True)
        ]
        for num_clusters in self.settings.purity.clusters:
            for layer in range(len(fit.names)):
                self.counts.append(
                    count_layer(system, layer, num_clusters, pair[0], pair[1], self.settings.purity, self.seed)
                )
        print(f"{system}: purity of {len(fit.names)} layers done", flush=True)


def _write(
    out_dir: Path, information: list[LayerValue], purity: _PurityTask | None, settings: AnalysisSettings, seed: int
) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    write_table_csv(out_dir / "mutual_information.csv", information)
    if information:
        plot_mutual_information(information, out_dir / "mutual_information")
    if purity is not None:
        rows: list[Any] = []
        for layer in purity.counts:
            rows += purity_rows(layer, settings.purity, seed)
        write_table_csv(out_dir / "purity.csv", rows)
        plot_purity(rows, out_dir / "purity")
        comparison = compare_systems(purity.counts, settings.purity.resamples, seed)
        write_json(out_dir / "purity_comparison.json", comparison)
