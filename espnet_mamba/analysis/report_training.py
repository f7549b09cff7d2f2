"""Sections of pretraining: the quality of its targets and its curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from espnet_mamba.analysis.curves import plot_training
from espnet_mamba.analysis.report_blocks import Block, Figure, Missing, Section, Table, Text, duration, number, percent
from espnet_mamba.analysis.report_inputs import Results

NO_TARGETS = (
    "SSAMBA has no targets whose quality could be told: it reconstructs masked patches of the spectrogram and tells "
    "them apart from each other, without k-means."
)


def targets_section(results: Results, out_dir: Path) -> Section:
    """Return how good the k-means targets are."""
    title = "Targets quality"
    if results.paths.targets is not None and not results.paths.targets:
        return Section(title, [Text(NO_TARGETS)])
    if not results.targets:
        return Section(title, [Missing("the quality of the targets", "stages 3 (targets1) and 5 (targets2)")])
    rows = [
        [record["folder"], _source(record), name, kind.replace("_", " "), str(record["num_clusters"])]
        + [str(quality.get("used_clusters", "–"))]
        + [percent(quality.get(key)) for key in ("purity", "cluster_purity", "pnmi")]
        + [str(quality.get("num_frames", "–"))]
        for record in results.targets
        for name, kinds in record["sets"].items()
        for kind, quality in (kinds if "purity" not in kinds else {"all": kinds}).items()
    ]
    if not rows:
        return Section(title, [Text("The data has no phones.ctm, so that purity and PNMI are not known.")])
    header = ["targets", "features", "set", "frames", "K", "used", "phone purity (%)", "cluster purity (%)", "PNMI (%)"]
    return Section(title, [Table([*header, "number of frames"], rows, left=(0, 1, 2, 3))])


def _source(record: dict[str, Any]) -> str:
    layer = record.get("layer")
    return Path(str(record.get("source", "–"))).name + (f", layer {layer}" if layer else "")


def training_section(results: Results, out_dir: Path) -> Section:
    """Return the training curves; the figure goes to ``out_dir``."""
    stages = "stages 4 (pretrain1) and 6 (pretrain2)"
    blocks: list[Block] = []
    if results.training:
        rows = [
            _training_row(name, split, own)
            for name, log in results.training.items()
            for split in ("train", "valid")
            if (own := [row for row in log if row.get("split") == split])
        ]
        header = ["run", "split", "last step", "loss", "loss of masked frames", "masked accuracy (%)", "time"]
        figure = plot_training(results.training, out_dir / "pretraining")
        blocks.append(Table(header, rows, left=(0, 1)))
        blocks.append(Figure(figure, "Loss and accuracy at masked frames against optimiser step."))
    for folder in results.paths.pretrain:
        if folder.name not in results.training:
            blocks.append(Missing(f"{folder}/train_log.jsonl", stages))
        blocks += left_out(folder)
    return Section("Pretraining curves", blocks or [Missing("training logs", stages)])


def left_out(folder: Path) -> list[Block]:
    """Return the recordings that training in ``folder`` could not read, by name."""
    path = folder / "unreadable.tsv"  # train/unreadable.py writes it
    if not path.is_file():
        return []
    header, *rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    text = f"{folder.name}: {len(rows)} recordings could not be read while training, and were left out."
    return [Text(text), Table(header, rows, left=tuple(range(len(header))))]


def _training_row(name: str, split: str, rows: list[dict[str, Any]]) -> list[str]:
    last = rows[-1]
    time = duration(sum(row.get("seconds", 0.0) for row in rows)) if split == "train" else "–"
    losses = [number(last.get("loss")), number(last.get("loss_masked"))]
    return [name, split, str(last.get("step", "–")), *losses, percent(last.get("accuracy_masked")), time]
