"""The calibration: known answers are known, the command tells right from wrong, and goes on where it stopped."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from espnet_mamba.analysis import bounds, calibration
from espnet_mamba.analysis.calibration import CalibrationRow, CalibrationSettings, calibrate, read_rows, write_rows
from espnet_mamba.analysis.calibration_data import (
    chain,
    equal_utterances,
    folded,
    folded_information,
    gaussians,
    noisy_channel,
    scaled,
)
from espnet_mamba.analysis.calibration_report import render_calibration, verdict, write_calibration

QUICK = replace(CalibrationSettings().quick(), dims=(1,), truths=(0.0, 0.5), sections=("gaussians", "codes"))


def gaussian_information(x, y):
    """Of Gaussian frames, from their covariances."""
    spread = [np.cov(side.double().numpy().T).reshape(2 * [side.shape[1]]) for side in (x, y, torch.cat([x, y], 1))]
    alone_x, alone_y, both = (np.linalg.slogdet(matrix)[1] for matrix in spread)
    return float(0.5 * (alone_x + alone_y - both))


@pytest.mark.parametrize("memory", [0.0, 0.95])
@pytest.mark.parametrize("dim", [1, 20])
def test_gaussians_share_what_they_are_said_to(dim, memory):
    case = gaussians(dim, (0.0, 0.5, 2.0, 5.0), 100_000, 20, seed=1, memory=memory)
    for layer, truth in zip(case.layers, case.truths, strict=True):
        assert gaussian_information(case.x, layer) == pytest.approx(truth, abs=0.06 if memory else 0.02)
    # One frame keeps its share of the one before, within an utterance only; each frame has deviation 1.
    frames = case.x[:, 0].view(20, -1)
    assert (frames[:, 1:] * frames[:, :-1]).mean() == pytest.approx(memory, abs=0.05)
    assert frames.std() == pytest.approx(1.0, abs=0.05)
    assert (frames[1:, 0] * frames[:-1, -1]).mean().abs() < 0.8


def test_chain_and_scaled_truths():
    case = chain(100_000, 20, seed=1)
    for layer, truth in zip(case.layers[:2], case.truths[:2], strict=True):
        assert gaussian_information(case.x, layer) == pytest.approx(truth, abs=0.02)
    assert gaussian_information(case.x[:, :1], case.layers[2]) == pytest.approx(case.truths[2], abs=0.02)
    assert case.truths[0] > case.truths[1] and case.truths[0] == pytest.approx(3 * case.truths[2])
    twice = scaled(case, 0.01, 1000.0)
    assert gaussian_information(twice.x, twice.layers[0]) == pytest.approx(case.truths[0], abs=0.02)


def test_folded_truth_against_its_own_frames():
    """H(y) by a histogram of many frames, less H(noise); and at next to no noise, the entropy of |x| itself."""
    case = folded(300_000, 1, seed=1)
    counts, edges = np.histogram(case.layers[0].numpy(), 300)
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * np.log(share)).sum() + math.log(edges[1] - edges[0])
    noise = 0.5 * math.log(2 * math.pi * math.e * 0.04)
    assert case.truths[0] == pytest.approx(entropy - noise, abs=0.01)
    assert folded_information(0.05) == pytest.approx(
        0.5 * math.log(2 * math.pi * math.e) - math.log(2) - 0.5 * math.log(2 * math.pi * math.e * 0.05**2), abs=0.05
    )


def test_noisy_channel_truths():
    assert noisy_channel(20, 0.0, 10, 0)[2] == pytest.approx(0.0, abs=1e-12)
    assert noisy_channel(20, 1.0, 10, 0)[2] == pytest.approx(math.log(20))
    labels, codes, truth = noisy_channel(4, 0.5, 400_000, 0)
    share = np.bincount(labels * 4 + codes).reshape(4, 4) / 400_000
    assert (share * np.log(share * 16)).sum() == pytest.approx(truth, abs=0.005)


def test_utterances_of_equal_length_only():
    assert equal_utterances(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="100 frames do not make 7 utterances"):
        gaussians(1, (0.5,), 100, 7, seed=0)
    with pytest.raises(ValueError, match="'gauss' is not one of: gaussians"):
        CalibrationSettings(sections=("gauss",))


def test_coverage_draws_its_own_data():
    settings = CalibrationSettings()
    names = [job.name for job in calibration._coverage_jobs(settings)]
    assert len(names) == 40 and names[0] == "coverage-1-1000" and names[-1] == "coverage-20-1019"
    first, second, other = (gaussians(1, (0.5,), 100, 4, seed).x for seed in (1000, 1000, 1001))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_calibrate_tells_right_from_wrong_and_goes_on(tmp_path, monkeypatch):
    rows = calibrate(QUICK, tmp_path)
    by = {(row.estimator, row.label): row for row in rows}
    for estimator in ("dv_heldout", "infonce_heldout", "smile_heldout", "nwj_heldout", "ksg4"):
        zero, half = by[estimator, "I = 0"], by[estimator, "I = 0.5"]
        assert verdict(zero) == "right" and abs(zero.null) < 0.1, estimator
        assert abs(half.value - 0.5) < 0.15 and half.low < half.value < half.high < half.ceiling, estimator
    assert verdict(by["mine_paper", "I = 0.5"]) == "off"  # five epochs of a slow critic see nothing yet
    assert verdict(by["miller_madow", "0.9 kept"]) == "right"
    assert by["mine_paper", "I = 0"].num_frames == 2 * QUICK.mine_frames
    monkeypatch.setattr(calibration, "measure", lambda *_: pytest.fail("a finished job was run again"))
    assert calibrate(QUICK, tmp_path) == read_rows(tmp_path / "calibration.csv")
    text = write_calibration(rows, tmp_path)
    assert "| 1 | dv_heldout |" in text and "Coverage" not in text
    assert all((tmp_path / f"calibration.{kind}").stat().st_size > 5000 for kind in ("svg", "png"))


def test_the_interval_reaches_up_by_what_the_value_misses():
    """Slack and true pairs among the product's raise the upper end alone, never beyond the ceiling."""
    values = np.random.default_rng(0).normal(2.0, 0.1, (1, 500))
    plain, missing, most = (bounds._summary(values, 4.0, 100, 12, *known) for known in ((0, 0), (0.3, 0.1), (9.0, 0)))
    assert missing.value == plain.value and missing.low == plain.low < plain.high
    assert missing.high - plain.high == pytest.approx(0.3 - math.log(0.9))
    assert most.high == 4.0 and bounds._summary(values, 4.0, 100, 12, -0.3, 0.0).high == plain.high


def row(**changed):
    values = {
        "section": "coverage", "case": "Gaussian", "dim": 1, "label": "I = 2", "estimator": "dv_heldout",
        "seed": 1000, "truth": 2.0, "value": 1.9, "low": 1.8, "high": 1.95, "ceiling": 8.0,
    }  # fmt: skip
    return CalibrationRow(**{**values, **changed})


def test_verdicts_and_coverage_counts():
    assert verdict(row()) == "right" and not row().covers and row(high=2.1).covers
    assert verdict(row(value=1.7)) == "off" and verdict(row(value=1.7, flag="ceiling")) == "flagged: ceiling"
    assert verdict(row(truth=0.0, value=0.06)) == "off" and verdict(row(truth=0.0, value=-0.2)) == "right"
    table = render_calibration([row(), row(seed=1001, high=2.1), row(seed=1002, flag="few_frames")])
    assert "| 1 | 2 | dv_heldout | 3 | 1 | 2 | -0.100 | 0.000 |" in table


def test_scaling_and_chain_tables_say_when_a_law_is_broken():
    shifted = [row(section="scaling", case=case, value=value) for case, value in (("a", 1.9), ("b", 2.5))]
    assert "0.6 | 0.075 | **no** |" in render_calibration(shifted)
    labels = {"y": (1.9, 1.8, 2.0), "z": (2.4, 2.2, 2.6)}
    broken = [
        row(section="chain", label=name, value=value, low=low, high=high) for name, (value, low, high) in labels.items()
    ]
    assert render_calibration(broken).rstrip().endswith("| **no** |")


def test_rows_come_back_from_their_file(tmp_path):
    rows = [row(flag="bias", null=0.01), row(low=math.nan)]
    write_rows(tmp_path / "rows.csv", rows)
    back = read_rows(tmp_path / "rows.csv")
    assert back[0] == replace(rows[0], doubt=math.nan) or back[0].null == 0.01
    assert math.isnan(back[1].low) and back[1].truth == 2.0
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="bad.csv: not a calibration table"):
        read_rows(tmp_path / "bad.csv")
