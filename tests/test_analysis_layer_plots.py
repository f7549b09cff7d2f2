"""Overlays of runs: which figures are made, that their CSV holds their numbers, and that lines can be told apart."""

from __future__ import annotations

import math
import sys

import matplotlib.pyplot as plt
import pytest

from espnet_mamba.analysis import layer_plots
from espnet_mamba.analysis.layer_plots import plot_layers, read_runs, styles_of
from espnet_mamba.analysis.table import LayerValue, read_table_csv, write_table_csv
from espnet_mamba.bin import plot_layers as command

NAN = float("nan")


def curve(system, values, measure="mutual_information", estimator="dv_heldout", reference="logmel", **options):
    fields = {"null": 0.01, "ceiling": 7.3, "unit": "nats", "num_utts": 30} | options
    return [
        LayerValue(system, i, f"layer{i}", measure, estimator, reference, v, v - 0.1, v + 0.1, **fields)
        for i, v in enumerate(values)
    ]


def accuracy(system, values):
    fields = {"measure": "phone_accuracy", "reference": "phones", "ceiling": 1.0, "unit": "fraction"}
    chance = curve(system, [0.2] * len(values), estimator="majority", **fields | {"null": NAN})
    return curve(system, values, estimator="lda", **fields) + chance


@pytest.fixture
def figures(monkeypatch):
    """Catch the figures before they are closed: stem -> figure."""
    caught = {}
    save = layer_plots.save_figure

    def keep(figure, stem):
        paths = save(figure, stem)
        caught[stem.name] = figure
        return paths

    monkeypatch.setattr(layer_plots, "save_figure", keep)
    return caught


def test_one_figure_per_kind_with_its_own_numbers(tmp_path, figures):
    rows = curve("mamba", [1 / 3, 0.8, 0.5]) + curve("fbank", [0.6])
    rows += curve("mamba", [0.4, 0.9], estimator="infonce_heldout") + accuracy("mamba", [0.5, 0.7])
    written = plot_layers(rows, tmp_path)
    stems = ["mutual_information_dv_heldout_logmel", "mutual_information_infonce_heldout_logmel"]
    stems.append("phone_accuracy_lda_phones")
    assert [path.name for path in written] == [f"{stem}.{kind}" for stem in stems for kind in ("svg", "png", "csv")]
    for stem in stems:
        table = read_table_csv(tmp_path / f"{stem}.csv")
        drawn = [line.get_ydata() for line in figures[stem].axes[0].get_lines()]
        numbers = {round(float(value), 12) for line in drawn for value in line}
        expected = {round(value, 12) for row in table for value in (row.value, row.null) if not math.isnan(value)}
        assert expected <= numbers, stem
        bands = [band.get_datalim(figures[stem].axes[0].transData) for band in figures[stem].axes[0].collections]
        assert min(band.y0 for band in bands) == pytest.approx(
            min(row.low for row in table if row.estimator != "majority")
        )
        assert max(band.y1 for band in bands) == pytest.approx(max(row.high for row in table))


def test_chance_is_a_line_of_the_probe_and_ceilings_near_the_values_are_drawn(tmp_path, figures):
    plot_layers(accuracy("mamba", [0.5, 0.7, 0.6]), tmp_path)
    panel = figures["phone_accuracy_lda_phones"].axes[0]
    lines = {
        line.get_linestyle(): list(line.get_ydata()) for line in panel.get_lines() if len(set(line.get_xdata())) > 1
    }
    assert lines["-"] == [0.5, 0.7, 0.6] and lines["--"] == [0.01] * 3
    assert lines["-."] == [0.2] * 3 and lines[":"] == [1.0, 1.0]
    assert panel.get_ylim()[1] > 1.0 and "input" in panel.get_xticklabels()[0].get_text()


def test_ceiling_far_above_is_written_not_drawn(tmp_path, figures):
    plot_layers(curve("mamba", [0.5, 0.7]), tmp_path)
    panel = figures["mutual_information_dv_heldout_logmel"].axes[0]
    assert "ceiling 7.3 is above the axis, 30 utterances" in panel.get_title()
    assert panel.get_ylim()[1] < 1.0 and panel.get_ylabel() == "mutual information (nats)"


def test_legend_covers_no_axes(tmp_path, figures):
    systems = [
        f"{name}{twin}" for name in ("mamba", "extbimamba", "conbimamba", "transformer") for twin in ("", " random")
    ]
    plot_layers([row for i, name in enumerate(systems) for row in curve(name, [0.1 * i, 0.2 * i])], tmp_path)
    figure = figures["mutual_information_dv_heldout_logmel"]
    figure.draw_without_rendering()
    legend, panel = figure.legends[0].get_window_extent(), figure.axes[0].get_tightbbox()
    assert legend.y1 <= panel.y0 + 1
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1
    assert len(figure.legends[0].get_texts()) == len(systems) + 2  # band and null; the ceiling is in the title


def test_styles_differ_and_random_twins_share_their_colour():
    many = [f"m{i}" for i in range(40)]
    assert len(set(styles_of(many).values())) == 40
    styles = styles_of(["pretrained", "random", "fbank", "mamba", "mamba random", "ssamba_random"])
    assert len(set(styles.values())) == 6
    assert styles["mamba random"].colour == styles["mamba"].colour and styles["mamba random"].hollow
    assert not styles["ssamba_random"].hollow and not styles["random"].hollow
    assert (styles["pretrained"].colour, styles["random"].colour) == ("#0072B2", "#D55E00")
    assert len({style.colour for style in styles_of(many).values()}) == 7


def write(folder, rows, name="mutual_information.csv"):
    folder.mkdir(parents=True, exist_ok=True)
    write_table_csv(folder / name, rows)
    return folder / name


def test_runs_are_told_apart_where_they_share_a_system(tmp_path):
    a = write(tmp_path / "analysis_a", curve("pretrained", [0.1]) + curve("fbank", [0.3]))
    b = write(tmp_path / "analysis_b", curve("pretrained", [0.2]) + curve("ssamba", [0.4]))
    systems = [row.system for row in read_runs([a, b])]
    assert systems == ["analysis_a: pretrained", "fbank", "analysis_b: pretrained", "ssamba"]
    assert read_runs([a, b], ["old", "new"])[2].system == "new: pretrained"
    probes = [
        write(tmp_path / run, accuracy("pretrained", [0.5]), "probes.csv") for run in ("analysis_a", "analysis_b")
    ]
    systems = {row.system for row in read_runs([a, probes[0], b, probes[1]])}
    assert systems == {"analysis_a: pretrained", "analysis_b: pretrained", "fbank", "ssamba"}
    copy = write(tmp_path / "analysis_a", curve("pretrained", [0.9]), "copy.csv")
    assert read_runs([a, copy])[-1].system == "copy: pretrained"
    with pytest.raises(ValueError, match="two tables of one run .* 2 rows for analysis_a: pretrained"):
        read_runs([a, copy, b])
    other = write(tmp_path / "analysis_a", accuracy("pretrained", [0.5]), "probes.csv")
    assert {row.system for row in read_runs([a, other])} == {"pretrained", "fbank"}  # one run, two measures


def test_bad_tables_are_named(tmp_path):
    table = write(tmp_path / "a", curve("m", [0.1]))
    with pytest.raises(FileNotFoundError, match="nowhere.csv: no such table; stage 11"):
        read_runs([tmp_path / "nowhere.csv"])
    with pytest.raises(ValueError, match="1 names for 2 tables"):
        read_runs([table, table], ["a"])
    with pytest.raises(ValueError, match="two tables of one run"):
        read_runs([table, table])
    twice = write(tmp_path / "b", curve("m", [0.1]) * 2)
    with pytest.raises(ValueError, match="2 rows for m 0 mutual_information dv_heldout logmel"):
        read_runs([twice])
    with pytest.raises(ValueError, match="no rows to draw"):
        plot_layers([], tmp_path)


def test_command_writes_the_same_bytes_twice_and_names_a_wrong_measure(tmp_path, monkeypatch, capsys):
    a = write(tmp_path / "a", curve("mamba", [0.1, 0.4, 0.2]) + accuracy("mamba", [0.4, 0.5, 0.6]))
    b = write(tmp_path / "b", curve("mamba", [0.2, 0.3, 0.1]))
    for out in ("one", "two"):
        monkeypatch.setattr(sys, "argv", ["plot_layers", str(a), str(b), "--out_dir", str(tmp_path / out)])
        command.main()
    assert capsys.readouterr().out.count("mutual_information_dv_heldout_logmel.svg") == 2
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 6
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    monkeypatch.setattr(sys, "argv", ["plot_layers", str(a), "--out_dir", str(tmp_path), "--measure", "pnmi"])
    with pytest.raises(ValueError, match="pnmi: not in these tables; they hold mutual_information, phone_accuracy"):
        command.main()
    assert not plt.get_fignums()
