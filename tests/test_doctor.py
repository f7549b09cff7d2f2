"""The doctor's lines, and forecasts whose answer is known by hand."""

import subprocess
import sys

import pytest

from espnet_mamba.efficiency.macs import count_macs
from espnet_mamba.efficiency.training_forecast import assumed_rate, forecast, measured_rate, read_plan
from espnet_mamba.models.config import load_config
from espnet_mamba.models.hubert import HubertModel


@pytest.fixture
def run_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("max_steps: 900\nbatch_bins: 320000\naccum_grad: 2\nmax_crop_samples: 160000\n")
    return path


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/utt2num_samples").write_text("a 480000\nb 160000\nc 80000\n")  # 30, 10, 5 s; crops 10, 10, 5 s
    return tmp_path / "set"


def test_a_forecast_is_macs_over_rate(root, run_yaml, corpus):
    config = load_config(root / "conf/models/extbimamba_tiny.yaml")
    plan = read_plan(run_yaml, corpus)
    assert (plan.steps, plan.batch_seconds, plan.accumulation) == (900, 20.0, 2)
    assert plan.audio_hours == 10.0 and plan.corpus_hours == 45 / 3600 and plan.crop_seconds == 25 / 3
    macs = 3 * sum(count_macs(config, 400_000 // 3).values()) * 36_000 / (25 / 3)
    lines = dict(forecast(config, plan, assumed_rate(macs * 2 / 1e12 / 3600 / 0.25, 0.25, 51.2), ngpu=4))
    assert lines["time, an estimate"] == "0.25 h on 4 GPU: 1 GPU-hours"  # at one GPU-hour's worth of MACs
    assert lines["run"] == "900 updates of 40 s: 10 h, 800 times the corpus"
    state = 16 * sum(p.numel() for p in HubertModel(config).parameters()) / 2**30
    assert lines["memory per device, an estimate"] == (  # a quarter of a batch of 20 s at 51.2 MiB each
        f"{0.25 + state:.3g} GiB: {state:.3g} for weights, gradients and AdamW, 0.25 for 5 s of audio"
    )
    assert dict(forecast(config, read_plan(run_yaml, None), assumed_rate(1.0, 1.0, 0.0), 0))["corpus"].startswith("not")


@pytest.mark.parametrize("kind", ["models/transformer_tiny", "ssamba/ssamba_mini"])
def test_a_step_is_measured(root, kind):
    from espnet_mamba.efficiency.macs_table import open_config

    rate = measured_rate(open_config(root / f"conf/{kind}.yaml"), "cpu")
    assert rate.macs_per_second > 1e7 and 0.1 < rate.activation_mb_per_second < 1000
    assert "measured on this CPU" in rate.source


def doctor(root, *words):
    command = [sys.executable, "-m", "espnet_mamba.bin.doctor", *[str(word) for word in words]]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_the_command_says_what_a_run_takes(root, run_yaml, corpus):
    model = root / "conf/models/mamba_tiny.yaml"
    done = doctor(root, "--config", model, "--pretrain_config", run_yaml, "--corpus", corpus, "--ngpu", 0)
    assert done.returncode == 0, done.stderr
    words = (
        "speed on cpu",
        "disk",
        "NLTK_DATA",
        "slurm",
        "CPU-hours",
        "time, an estimate",
        "memory per device, an est",
    )
    assert all(word in done.stdout for word in words), done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", "conf/models/mamba_tiny.yaml"], "needs both --config"),
        (["--config", "no.yaml", "--pretrain_config", "conf/pretrain/tiny_it1.yaml"], "no.yaml"),
        (["--config", "conf/models/mamba_tiny.yaml", "--pretrain_config", "conf/asr/decode.yaml"], "no max_steps or"),
        (
            [
                "--config",
                "conf/models/mamba_tiny.yaml",
                "--pretrain_config",
                "conf/pretrain/tiny_it1.yaml",
                "--mfu",
                "3",
            ],
            "--mfu 3.0",
        ),
    ],
)
def test_mistakes_are_one_line(root, monkeypatch, capsys, words, message):
    from espnet_mamba import doctor as module
    from espnet_mamba.bin.cli import run_main
    from espnet_mamba.bin.doctor import main

    monkeypatch.chdir(root)
    monkeypatch.setattr(module, "describe", list)
    monkeypatch.setattr(sys, "argv", ["doctor", *words])
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and len(said.splitlines()) == 1
