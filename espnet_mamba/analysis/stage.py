"""The analysis stage: one pass over the audio per system, then every measure, its table and its figure."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from espnet_mamba.analysis.comparison import compare_systems
from espnet_mamba.analysis.layer_information import information_notes, information_rows
from espnet_mamba.analysis.layer_measures import LayerMeasures
from espnet_mamba.analysis.layer_plots import plot_layers
from espnet_mamba.analysis.mutual_information import MEASURE
from espnet_mamba.analysis.parts import SystemResult, part_key, part_path, read_part, write_part
from espnet_mamba.analysis.plots import plot_mutual_information, plot_purity
from espnet_mamba.analysis.purity import PurityTask, purity_rows
from espnet_mamba.analysis.settings import AnalysisSettings
from espnet_mamba.analysis.statistics import (
    DTYPES,
    LayerFeatures,
    choose_utterances,
    collect_features,
    split_layer,
    write_features,
)
from espnet_mamba.analysis.table import write_table_csv
from espnet_mamba.data.files import write_json
from espnet_mamba.data.manifest import Utterance, read_manifest
from espnet_mamba.targets.features import CONV, FeatureSource, add_conv, open_features

NO_PHONES = "phone purity is left out: it needs {} (stage 1 writes it when phone times are known)"
NO_CONV = "{}: mutual information with conv is left out: this system has no convolutional front end to read"
LABELS = ("phones.ctm", "words.ctm", "utt2spk", "utt2emotion")


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
    system, so that callers may bring sources that this room must not know (S3PRL's, ESPnet's). Systems that an earlier
    run into ``out_dir`` finished are read back (parts.py). ValueError names what cannot be measured, and where.
    """
    started = time.perf_counter()
    folders = [Path(dump_dir) / name for name in sets]
    manifests = [read_manifest(folder) for folder in folders]
    sources = {name: open_source(spec) for name, spec in systems.items()}
    notes = _with_conv(sources) if CONV in settings.references else []
    widest = max(sum(source.dims) for source in sources.values()) * (4 if settings.dtype == "float32" else 2)
    # Two sets are held at once, so each gets half of the limit.
    limit = settings.max_memory_mb / 2
    chosen = [choose_utterances(utts, settings.max_utterances, limit, widest, seed) for utts in manifests]
    stage = _Stage(settings, folders, chosen, Path(out_dir), seed, dict(systems))
    results = []
    for number, (name, source) in enumerate(sources.items(), start=1):
        begun, path = time.perf_counter(), stage.part_of(name)
        result = read_part(path)
        how = "read back from an earlier run"
        if result is None:
            result = stage.measure(name, source)
            write_part(path, result)
            how = f"done in {time.perf_counter() - begun:.0f} s"
        results.append(result)
        print(f"{name}: {how}, {number} of {len(sources)} systems", flush=True)
    notes = list(dict.fromkeys([*stage.notes, *notes, *(note for result in results for note in result.notes)]))
    write_results(Path(out_dir), results, settings, seed)
    record = {"settings": asdict(settings), "systems": dict(systems), "sets": list(sets), "seed": seed, "notes": notes}
    record["num_utts"] = [len(part) for part in chosen]
    record["seconds"] = round(time.perf_counter() - started, 1)
    write_json(Path(out_dir) / "analysis.json", record)
    for note in notes:
        print(note, flush=True)
    count = sum(len(result.information) + len(result.layers) for result in results)
    print(f"analysis: {count} values of {len(sources)} systems in {record['seconds']} s -> {out_dir}", flush=True)


def _with_conv(sources: Mapping[str, FeatureSource]) -> list[str]:
    """Have every source give its convolution output; return a line for each system of several layers without one."""
    lacking = [name for name, source in sources.items() if not add_conv(source) and len(source.names) > 1]
    return [NO_CONV.format(name) for name in lacking]


@dataclass
class _Stage:
    """What all systems share: utterances, labels, log-mel."""

    settings: AnalysisSettings
    folders: Sequence[Path]
    chosen: Sequence[Sequence[Utterance]]
    out_dir: Path
    seed: int
    systems: dict[str, str]

    def __post_init__(self) -> None:
        missing = [path for path in (folder / "phones.ctm" for folder in self.folders) if not path.is_file()]
        self.notes = [NO_PHONES.format(missing[0])] if missing else []
        alignments = [folder / "phones.ctm" for folder in self.folders]
        self.purity = None if missing else PurityTask(alignments, self.settings.purity, self.seed)
        self._logmel: LayerFeatures | None = None

    def part_of(self, system: str) -> Path:
        """Return where the part of a system stands or will stand."""
        spec = self.systems[system]
        settings, utts = asdict(self.settings), [[(u.utt_id, u.num_samples) for u in part] for part in self.chosen]
        about = {"settings": settings, "system": system, "spec": spec, "utterances": utts, "seed": self.seed}
        files = [folder / name for folder in self.folders for name in ("wav.scp", *LABELS)]
        model = [Path(piece) for piece in spec.split(":") if Path(piece).exists()]
        return part_path(self.out_dir, system, part_key(about, [*files, *model]))

    def measure(self, name: str, source: FeatureSource) -> SystemResult:
        """Extract both sets once and take every measure."""
        settings, logmel = self.settings, self.logmel()
        test, conv = split_layer(self._extract(name, source, 1), CONV)
        phones = None if self.purity is None else (self.purity.segments[1], self.purity.numbers)
        measures = LayerMeasures(settings, self.folders[1], self.chosen[1], logmel, phones, self.seed)
        result = SystemResult(notes=information_notes(name, test, settings))
        if len(source.names) > 1:
            inputs: dict[str, Tensor] = {} if logmel is None else {"logmel": logmel.layers[0]}
            inputs |= {} if conv is None else {CONV: conv}
            result.information = information_rows(name, test, inputs, settings, self.seed)
        fit, _ = split_layer(self._extract(name, source, 0), CONV)
        if self.purity is not None:
            result.counts = self.purity.count(name, fit, test)
        result.layers = measures.measure(name, test, fit)
        result.notes += measures.notes
        return result

    def logmel(self) -> LayerFeatures | None:
        """Return the test set's log-mel frames, extracted when first asked for."""
        if self._logmel is None and "logmel" in self.settings.references:
            self._logmel = collect_features(
                open_features("logmel"), self.chosen[1], DTYPES[self.settings.dtype], "logmel"
            )
        return self._logmel

    def _extract(self, name: str, source: FeatureSource, number: int) -> LayerFeatures:
        label = f"{name} {self.folders[number].name}"
        features = collect_features(source, self.chosen[number], DTYPES[self.settings.dtype], label)
        if self.settings.keep_features:
            stem = re.sub(r"[^\w.-]+", "-", label.replace(" ", "_"))
            write_features(Path(self.settings.keep_features) / f"{stem}.safetensors", features)
        return features


def write_results(out_dir: Path, results: Sequence[SystemResult], settings: AnalysisSettings, seed: int) -> None:
    """Write the tables of all systems and their figures."""
    systems = list(dict.fromkeys(row.system for r in results for row in (*r.information, *r.layers, *r.counts)))
    information = [row for result in results for row in result.information]
    write_table_csv(out_dir / "mutual_information.csv", information)
    drawn = [row for row in information if row.measure == MEASURE]
    if drawn:
        plot_mutual_information(drawn, out_dir / "mutual_information", systems)
    layers = [row for result in results for row in result.layers]
    if layers:
        write_table_csv(out_dir / "layers.csv", layers)
        plot_layers(layers, out_dir / "layers", systems)
    counts = [layer for result in results for layer in result.counts]
    if counts:
        rows = [row for layer in counts for row in purity_rows(layer, settings.purity, seed)]
        write_table_csv(out_dir / "purity.csv", rows)
        plot_purity(rows, out_dir / "purity", systems)
        write_json(out_dir / "purity_comparison.json", compare_systems(counts, settings.purity.resamples, seed))
