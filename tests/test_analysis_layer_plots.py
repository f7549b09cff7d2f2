"""Overlays of runs: which figures are made, that their CSV holds their numbers, and that lines can be told apart."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
from matplotlib.collections import PathCollection

from espnet_mamba.analysis import layer_plots
from espnet_mamba.analysis.layer_plots import plot_layers
from espnet_mamba.analysis.overview import overview_kinds, peaks_of
from espnet_mamba.analysis.plots import plot_mutual_information
from espnet_mamba.analysis.runs import read_runs
from espnet_mamba.analysis.styles import styles_of
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
    assert "ceiling 7.3 off the axis, 30 utterances" in panel.get_title()
    assert panel.get_ylim()[1] < 1.0 and panel.get_ylabel() == "information (nats)"


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


def test_no_two_of_a_reports_systems_look_alike():
    many = ["pretrained", "random", "fbank", *(f"m{i}" for i in range(20))]
    assert len(set(styles_of(many).values())) == 23
    assert not {"#0072B2", "#D55E00", "#009E73"} & {styles_of(many)[f"m{i}"].colour for i in range(20)}
    runs = styles_of(["a: pretrained", "a: random", "b: pretrained", "b: random", "a: fbank"])
    assert runs["a: random"].hollow and runs["a: random"].colour == runs["a: pretrained"].colour
    assert runs["a: pretrained"].colour != runs["b: pretrained"].colour


def test_a_system_looks_the_same_where_others_are_not_drawn(tmp_path, figures):
    systems = ["fbank_40", "mamba", "ssamba"]
    plot_layers(curve("ssamba", [0.1, 0.2]), tmp_path / "one", systems)
    line = next(
        line for line in figures["mutual_information_dv_heldout_logmel"].axes[0].get_lines() if line.get_marker()
    )
    assert line.get_color() == styles_of(systems)["ssamba"].colour


def test_depths_are_put_on_one_axis(tmp_path, figures):
    rows = curve("small", [0.1, 0.2, 0.3]) + curve("large", [0.1, 0.2, 0.3, 0.4, 0.5]) + curve("fbank", [0.2])
    plot_layers(rows, tmp_path, relative_depth=True)
    panel = figures["mutual_information_dv_heldout_logmel"].axes[0]
    places = [list(line.get_xdata()) for line in panel.get_lines() if line.get_marker() not in (None, "None", "")]
    assert places == [[0, 0.5, 1], [0, 0.25, 0.5, 0.75, 1]]
    level = [line for line in panel.get_lines() if list(line.get_ydata()) == [0.2, 0.2]]
    assert [list(line.get_xdata()) for line in level] == [[0.0, 1.0]]


def test_flags_are_crossed_and_values_far_below_0_are_written(tmp_path, figures):
    rows = curve("mamba", [0.5, -40.0, 0.4], measure="reconstruction", ceiling=1.0, unit="R^2")
    rows[2] = replace(rows[2], flag="few_frames")
    plot_layers(rows, tmp_path)
    panel = figures["reconstruction_dv_heldout_logmel"].axes[0]
    assert -1.0 < panel.get_ylim()[0] < 0.0 and panel.get_ylabel() == "reconstruction (R²)"
    assert "down to -40, below the axis, crossed: too few frames" in panel.get_title()
    crosses = [found for found in panel.collections if isinstance(found, PathCollection)]
    assert [tuple(found.get_offsets()[0]) for found in crosses] == [(2.0, 0.4)]


def test_values_that_are_mostly_far_below_0_stay_on_the_axis(tmp_path, figures):
    plot_layers([replace(row, high=1.0, null=0.0) for row in curve("mamba", [-9.0, -12.0, -10.0])], tmp_path)
    panel = figures["mutual_information_dv_heldout_logmel"].axes[0]
    assert panel.get_ylim()[0] < -12.0 and "below the axis" not in panel.get_title()


def test_a_kind_without_values_says_so(tmp_path, figures):
    plot_layers([replace(row, value=NAN, low=NAN, high=NAN) for row in curve("mamba", [0.5, 0.6])], tmp_path)
    panel = figures["mutual_information_dv_heldout_logmel"].axes[0]
    assert [text.get_text() for text in panel.texts] == ["no value"]


ESTIMATORS = ("mine_paper", "mine_paper_reuse", "dv_heldout", "infonce_heldout", "dv_heldout_per_utterance", "ksg4")


def test_many_estimators_are_split_by_reference(tmp_path):
    rows = [
        row
        for estimator in ESTIMATORS
        for reference in ("layer0", "conv")
        for row in curve("mamba", [0.1, 0.2], estimator=estimator, reference=reference)
    ]
    rows += curve("mamba", [-0.1, -0.1], measure="mutual_information_bias", estimator="ksg4", ceiling=NAN, null=NAN)
    paths = plot_mutual_information(rows, tmp_path / "mi")
    stems = ["mi", "mi_layer0", "mi_conv"]
    names = [f"{stem}.{kind}" for stem in stems for kind in ("svg", "png", "csv") if (stem, kind) != ("mi", "csv")]
    assert [path.name for path in paths] == names
    own = read_table_csv(tmp_path / "mi_conv.csv")
    assert {row.estimator for row in own} == set(ESTIMATORS) and {row.reference for row in own} == {"conv"}
    few = [row for row in rows if row.estimator in ESTIMATORS[:4]]
    assert [path.name for path in plot_mutual_information(few, tmp_path / "few")] == ["few.svg", "few.png"]


def test_overview_takes_the_best_bound_and_the_largest_k():
    rows = [row for name in ("nwj_heldout", *ESTIMATORS) for row in curve("mamba", [0.1, 0.2], estimator=name)]
    for clusters in (50, 500):
        rows += curve("mamba", [0.3], "pnmi", f"kmeans{clusters}", "phones")
    rows += accuracy("mamba", [0.5]) + curve("mamba", [1.0], "cca_mean", "heldout_5folds", "emotion")
    kinds = [(kind[0].measure, kind[0].estimator) for kind in overview_kinds(rows)]
    assert kinds == [
        ("mutual_information", "infonce_heldout"), ("mutual_information", "mine_paper"), ("pnmi", "kmeans500"),
        ("phone_accuracy", "lda"), ("cca_mean", "heldout_5folds"),
    ]  # fmt: skip
    assert {row.estimator for row in overview_kinds(rows)[3]} == {"lda", "majority"}


def test_peaks_say_which_layers_cannot_be_told_apart():
    rows = curve("mamba", [0.1, 0.55, 0.6, NAN]) + curve("empty", [NAN]) + accuracy("fbank", [0.3])
    peaks = peaks_of(rows)
    assert [(peak.row.system, peak.row.layer, peak.within, peak.num_layers) for peak in peaks] == [
        ("mamba", 2, (1, 2), 3),
        ("fbank", 0, (0,), 1),
    ]


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
    c = write(tmp_path / "analysis_c", curve("pretrained", [0.7]) + curve("fbank", [0.3]))
    systems = [row.system for row in read_runs([a, c])]
    assert systems == ["analysis_a: pretrained", "fbank", "analysis_c: pretrained"], "the same values stay one system"
    other = write(tmp_path / "analysis_a", accuracy("pretrained", [0.5]), "probes.csv")
    assert {row.system for row in read_runs([a, other])} == {"pretrained", "fbank"}  # one run, two measures


def test_bad_tables_are_named(tmp_path):
    table = write(tmp_path / "a", curve("m", [0.1]))
    with pytest.raises(FileNotFoundError, match="nowhere.csv: no such table; stage 11"):
        read_runs([tmp_path / "nowhere.csv"])
    with pytest.raises(ValueError, match="1 names for 2 tables"):
        read_runs([table, table], ["a"])
    with pytest.raises(ValueError, match="a run's name is empty"):
        read_runs([table], [" "])
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
    assert len(names) == 9  # svg, png and csv of two measures and of the overview
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    monkeypatch.setattr(sys, "argv", ["plot_layers", str(a), "--out_dir", str(tmp_path), "--measure", "pnmi"])
    with pytest.raises(ValueError, match="pnmi: not in these tables; they hold mutual_information, phone_accuracy"):
        command.main()
    assert not plt.get_fignums()
