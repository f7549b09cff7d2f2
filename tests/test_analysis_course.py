"""The figure of a run's course: what it picks from an analysis, what it writes, and what it refuses."""

from __future__ import annotations

import csv
import json
import sys

import pytest

from espnet_mamba.analysis.course import best_layers, plot_course, purity_of_steps
from espnet_mamba.analysis.table import LayerValue, write_table_csv
from espnet_mamba.bin import plot_course as command


def value_of(system, layer, value, estimator="kmeans100", reference="phones", measure="phone_purity"):
    return LayerValue(
        system=system,
        layer=layer,
        layer_name=f"layer{layer}",
        measure=measure,
        estimator=estimator,
        reference=reference,
        value=value,
        low=value - 0.01,
        high=value + 0.01,
        null=0.05,
        ceiling=1.0,
        unit="fraction",
        num_frames=100,
        num_utts=4,
    )


ROWS = [
    value_of("mamba@20", 0, 0.2),
    value_of("mamba@20", 1, 0.3),
    value_of("mamba@0", 0, 0.15),
    value_of("mamba@0", 1, 0.1),
    value_of("mamba@20", 1, 0.9, estimator="kmeans50"),
    value_of("mamba@20", 1, 0.9, reference="phones_and_silence"),
    value_of("mamba@20", 1, 0.9, measure="pnmi"),
    value_of("fbank", 0, 0.9),
]
LOG = [
    {"step": 10, "split": "train", "loss_masked": 4.0, "accuracy_masked": 0.1},
    {"step": 20, "split": "valid", "loss_masked": 3.0, "accuracy_masked": 0.2},
]


def test_purity_of_the_largest_k_without_silence_in_order_of_steps():
    purity = purity_of_steps(ROWS)
    assert [(row.run, row.step, row.layer, row.value) for row in purity] == [
        ("mamba", 0, 0, 0.15),
        ("mamba", 0, 1, 0.1),
        ("mamba", 20, 0, 0.2),
        ("mamba", 20, 1, 0.3),
    ]
    assert [(row.step, row.layer) for row in best_layers(purity)] == [(0, 0), (20, 1)]


def test_a_table_without_steps_is_refused():
    with pytest.raises(ValueError, match="RUN@STEP"):
        purity_of_steps([value_of("fbank", 0, 0.9)])


@pytest.mark.parametrize("with_purity", [True, False])
def test_figure_and_its_numbers_are_written(tmp_path, with_purity):
    purity = purity_of_steps(ROWS) if with_purity else []
    plot_course({"mamba": LOG, "never validated": LOG[:1]}, purity, tmp_path / "course")
    assert (tmp_path / "course.svg").stat().st_size > 0 and (tmp_path / "course.png").stat().st_size > 0
    with open(tmp_path / "course.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert [float(row["phone_purity"]) for row in rows] == ([0.15, 0.1, 0.2, 0.3] if with_purity else [])


def test_command_names_a_run_that_has_purity_but_no_log(tmp_path, monkeypatch):
    (tmp_path / "train_log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LOG))
    write_table_csv(tmp_path / "purity.csv", ROWS)
    words = ["plot_course", "--purity", str(tmp_path / "purity.csv"), "--out", str(tmp_path / "figures/course")]
    monkeypatch.setattr(sys, "argv", [*words, "--run", f"mamba={tmp_path}"])
    command.main()
    assert (tmp_path / "figures/course.svg").is_file()
    monkeypatch.setattr(sys, "argv", [*words, "--run", f"other={tmp_path}"])
    with pytest.raises(ValueError, match="runs mamba are not given"):
        command.main()
    monkeypatch.setattr(sys, "argv", [*words, "--run", f"mamba={tmp_path}/nowhere"])
    with pytest.raises(FileNotFoundError, match="stages 4 and 6"):
        command.main()
