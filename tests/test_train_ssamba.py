"""SSAMBA pretraining through ESPnet's own options, resumed, and its upstream through S3PRL."""

import json
import sys

import numpy as np
import pytest
import soundfile
import torch
import yaml
from test_models_ssamba import assert_near, speech

pytestmark = pytest.mark.espnet
LENGTHS = (9000, 13000, 8000, 20000, 7000, 12000, 10000, 16000)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A few synthetic utterances, as stage 2 would leave them, and a small model."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, lengths in (("train", LENGTHS), ("dev", LENGTHS[:3])):
        (folder / name).mkdir()
        rows = []
        for i, length in enumerate(lengths):
            soundfile.write(folder / f"{name}{i}.wav", speech(length, seed=10 * len(name) + i).numpy(), 16000)
            rows.append((f"{name}{i:02d}", folder / f"{name}{i}.wav", length))
        (folder / name / "wav.scp").write_text("".join(f"{utt} {path}\n" for utt, path, _ in rows))
        (folder / name / "utt2num_samples").write_text("".join(f"{utt} {length}\n" for utt, _, length in rows))
    model = {"kind": "ssamba", "embed_dim": 16, "depth": 4, "state_size": 4, "num_mel_bins": 32, "num_frames": 128}
    (folder / "small.yaml").write_text(yaml.safe_dump(model | {"mask_patches": 9, "mask_squares": [1, 3]}))
    return folder


def arguments(corpus, out, root, *extra):
    words = ["--config", root / "conf/pretrain/ssamba_tiny.yaml", "--model", corpus / "small.yaml", "--ngpu", 0]
    words += ["--output_dir", out, "--batch_bins", 40000]
    for split, name in (("train", "train"), ("valid", "dev")):
        words += [f"--{split}_data_path_and_name_and_type", f"{corpus}/{name}/wav.scp,speech,sound"]
        words += [f"--{split}_shape_file", f"{corpus}/{name}/utt2num_samples"]
    words += ["--num_iters_per_epoch", 5, "--save_interval_steps", 2, "--log_interval", 3]
    return [str(word) for word in (*words, *extra)]


def train(corpus, out, root, *extra):
    from espnet_mamba.train.ssamba_task import SsambaTask

    SsambaTask.main(cmd=arguments(corpus, out, root, *extra))
    rows = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    timed = ("seconds", "audio_rate", "data_wait", "mfu")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(corpus, root, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return train(corpus, out, root, "--max_steps", "12"), out


def test_a_run_logs_its_parts_and_leaves_models(undisturbed):
    from espnet_mamba.models.ssamba.checkpoints import load_checkpoint

    rows, out = undisturbed
    assert [row["step"] for row in rows if row["split"] == "train"] == [3, 5, 6, 9, 10, 12]
    assert [row["step"] for row in rows if row["split"] == "valid"] == [5, 10, 12]
    for row in rows:
        assert {"loss", "loss_info_nce", "loss_mse", "accuracy_masked"} <= set(row)
        assert "accuracy_unmasked" not in row and "feature_penalty" not in row
        assert row["loss"] == pytest.approx(row["loss_info_nce"] + 10 * row["loss_mse"])
        assert 0 <= row["accuracy_masked"] <= 1
    valid = [row["loss"] for row in rows if row["split"] == "valid"]
    assert valid[-1] < valid[0]
    assert load_checkpoint(out / "last").config.embed_dim == 16
    assert load_checkpoint(out / "valid.loss.best").training is False


def test_resumed_in_the_middle_of_an_epoch_is_the_same_run(undisturbed, corpus, root, tmp_path, monkeypatch):
    from espnet_mamba.train.trainer import TrainingRun

    saved = TrainingRun.save

    def save_then_die(self, step):
        saved(self, step)
        if step == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(TrainingRun, "save", save_then_die)
    with pytest.raises(KeyboardInterrupt):
        train(corpus, tmp_path / "r", root, "--max_steps", "12")
    monkeypatch.undo()
    assert train(corpus, tmp_path / "r", root, "--max_steps", "12") == undisturbed[0]
    whole = torch.load(undisturbed[1] / "checkpoint.pth", weights_only=True)
    resumed = torch.load(tmp_path / "r/checkpoint.pth", weights_only=True)
    assert all(torch.equal(whole["model"][name], resumed["model"][name]) for name in whole["model"])
    assert whole["scheduler"] == resumed["scheduler"] and "best_accuracy" in whole["scheduler"]


def test_real_speech_lowers_both_losses(so762, root, tmp_path):
    """The shipped mini model and its recipe's settings on a minute of recorded speech."""
    (tmp_path / "train").mkdir()
    lines, shapes, total = [], [], 0
    for line in (so762 / "train/wav.scp").read_text().splitlines():
        utt, path = line.split(maxsplit=1)
        length = soundfile.info(so762 / path).frames
        lines.append(f"{utt} {so762 / path}\n")
        shapes.append(f"{utt} {length}\n")
        total += length
        if total > 60 * 16000:
            break
    for name in ("train", "dev"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "wav.scp").write_text("".join(lines))
        (tmp_path / name / "utt2num_samples").write_text("".join(shapes))
    options = ["--model", str(root / "conf/ssamba/ssamba_mini.yaml"), "--batch_bins", "128000", "--max_steps", "40"]
    rows = train(tmp_path, tmp_path / "out", root, *options, "--num_iters_per_epoch", "10", "--log_interval", "10")
    valid = [row for row in rows if row["split"] == "valid"]
    assert valid[-1]["loss_info_nce"] < valid[0]["loss_info_nce"]
    assert valid[-1]["loss_mse"] < valid[0]["loss_mse"]


def test_wrong_models_and_options_are_refused(corpus, root, tmp_path, undisturbed):
    with pytest.raises(FileNotFoundError, match="did you mean 'small'"):
        train(corpus, tmp_path / "m", root, "--model", str(corpus / "smal.yaml"))
    with pytest.raises(ValueError, match="--max_epoch: not read in pretraining"):
        train(corpus, tmp_path / "e", root, "--max_epoch", "3")
    with pytest.raises(ValueError, match="cannot be packed into rows; use --batch_type numel"):
        train(corpus, tmp_path / "p", root, "--batch_type", "packed")
    with pytest.raises(ValueError, match="unknown key 'embd_dim'; did you mean 'embed_dim'"):
        train(corpus, tmp_path / "c", root, "--model_conf", "embd_dim=8")
    with pytest.raises(ValueError, match="not an SSAMBA model: it lacks the line 'kind: ssamba'"):
        train(corpus, tmp_path / "h", root, "--model", str(root / "conf/models/extbimamba_tiny.yaml"))
    (tmp_path / "o").mkdir()
    (tmp_path / "o/checkpoint.pth").write_bytes((undisturbed[1] / "checkpoint.pth").read_bytes())
    with pytest.raises(ValueError, match="belongs to another model"):
        train(corpus, tmp_path / "o", root, "--model_conf", "embed_dim=32")


def test_every_ssamba_yaml_builds_with_every_pretraining_yaml(root, tmp_path):
    from espnet_mamba.train.ssamba_task import SsambaTask

    for path in sorted((root / "conf/pretrain").glob("ssamba_*.yaml")):
        words = ["--config", str(path), "--model", str(root / "conf/ssamba/ssamba_mini.yaml"), "--ngpu", "0"]
        SsambaTask.main(cmd=[*words, "--output_dir", str(tmp_path / path.stem), "--dry_run", "true"])
        config = yaml.safe_load((tmp_path / path.stem / "config.yaml").read_text())
        assert config["optim"] == "adamw" and config["optim_conf"]["betas"] == [0.95, 0.999]
        assert config["optim_conf"]["weight_decay"] == 5e-8
    assert config["optim_conf"]["lr"] == 0.001
    base = yaml.safe_load((tmp_path / "ssamba_base" / "config.yaml").read_text())
    warmup = base["scheduler_conf"]["warmup_ratio"] * base["max_steps"]
    assert base["optim_conf"]["lr"] == 1e-4 and round(warmup) == 1001


def test_rate_stays_behind_the_warmup_and_halves_on_a_plateau():
    from espnet_mamba.train.schedules import PolynomialWarmup
    from espnet_mamba.train.ssamba_trainer import watch_plateau

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = PolynomialWarmup(optimizer, warmup_ratio=0.2, total_steps=10, power=0)
    rates = []
    for accuracy in (0.1, 0.2, 0.2, 0.1, 0.2, 0.1, 0.3, 0.3, 0.3, 0.3):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        watch_plateau(schedule, accuracy, patience=2, factor=0.5)
        schedule.step()
    assert rates == [0.5, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5]
    restored = PolynomialWarmup(optimizer, warmup_ratio=0.2, total_steps=10, power=0)
    restored.load_state_dict(schedule.state_dict())
    assert restored.base_lrs == schedule.base_lrs == [0.25] and restored.best_accuracy == 0.3


def test_crops_are_whole_patches_and_depend_on_the_utterance_alone():
    from espnet_mamba.train.ssamba_model import SsambaCollate, whole_patches

    assert [whole_patches(n, 16) for n in (399, 2799, 2800, 5359, 5360, 164_080)] == [
        399,
        2799,
        2800,
        2800,
        5360,
        164_080,
    ]
    items = [(f"u{n}", {"speech": np.arange(n, dtype=np.float32)}) for n in (9000, 6000)]
    _, batch = SsambaCollate(seed=0, train=True)(items)
    assert batch["speech"].shape == (2, 5360) and list(batch) == ["speech"]
    assert torch.equal(SsambaCollate(seed=0, train=True)(items[::-1])[1]["speech"][1], batch["speech"][0])
    firsts = {float(SsambaCollate(seed=0, train=True, epoch=e)(items)[1]["speech"][0, 0]) for e in range(6)}
    assert len(firsts) > 2
    _, batch = SsambaCollate(seed=0, train=False)(items)
    assert batch["speech"].shape == (2, 9000) and batch["num_samples"].tolist() == [9000, 6000]


def test_the_command_is_registered_for_help(root):
    from espnet_mamba.train.ssamba_task import SsambaTask

    assert "--plateau_patience" in SsambaTask.get_parser().format_help()


# --- S3PRL ---


@pytest.mark.parametrize(("name", "width"), [("ssamba", 32), ("ssamba_mean", 16), ("ssamba_local", 32)])
def test_s3prl_sees_the_model(undisturbed, name, width):
    from s3prl.nn import S3PRLUpstream

    import s3prl_upstream  # noqa: F401
    from espnet_mamba.models.ssamba.checkpoints import load_checkpoint

    folder = undisturbed[1] / "last"
    upstream = S3PRLUpstream(name, path_or_url=str(folder)).eval()
    assert (upstream.num_layers, upstream.hidden_sizes, upstream.downsample_rates) == (3, [width] * 3, [2560] * 3)
    lengths = [9000, 300, 17921]
    wavs = torch.zeros(3, max(lengths))
    for row, length in enumerate(lengths):
        wavs[row, :length] = speech(length, seed=row)
    with torch.no_grad():
        states, frames = upstream(wavs, torch.tensor(lengths))
        model = load_checkpoint(folder)
        expected, columns = model.extract_features(wavs[:1, :9000], frames="mean" if width == 16 else "concat")
    assert frames[0].tolist() == [4, 1, 8] and columns.tolist() == [4]
    for state, layer in zip(states, expected, strict=True):
        assert_near(state[0, :4], layer[0])
        assert torch.equal(state[2, 7], state[2, 6])  # 17921 samples begin an eighth hop but no eighth patch
    assert all(torch.isfinite(state).all() for state in states)
    upstream.train()
    assert not upstream.upstream.model.training


def test_frames_repeated_to_50_hz(undisturbed):
    from s3prl_upstream.ssamba.hubconf import ssamba, ssamba_50hz, ssamba_mean

    wavs = [speech(9000), speech(6000, seed=1)]
    slow, fast = (build(str(undisturbed[1] / "last"))(wavs)["hidden_states"] for build in (ssamba_mean, ssamba_50hz))
    assert fast[0].shape == (2, 29, 16) and slow[0].shape == (2, 4, 16)
    for few, many in zip(slow, fast, strict=True):
        assert torch.equal(many, few.repeat_interleave(8, dim=1)[:, :29])
    with pytest.raises(ValueError, match="repeat_to: 300 samples do not divide a column's 2560"):
        ssamba(str(undisturbed[1] / "last"), repeat_to=300)


def test_stage_7s_check_reads_ssamba_at_50_hz_and_scales_its_doubled_stream(undisturbed, corpus, tmp_path, monkeypatch):
    from espnet_mamba.models.ssamba.checkpoints import save_checkpoint
    from espnet_mamba.models.ssamba.config import SsambaConfig
    from espnet_mamba.models.ssamba.frames import SsambaFrames
    from espnet_mamba.models.ssamba.model import SsambaModel
    from s3prl_upstream.check import check_upstream

    wavs = [corpus / f"train{i}.wav" for i in range(3)]
    found = check_upstream(undisturbed[1] / "last", wavs)
    assert (found["num_layers"], found["width"], found["rate"]) == (3, 16, 320) and found["largest_difference"] < 1e-4
    config = SsambaConfig(embed_dim=16, depth=24, state_size=4, num_mel_bins=32, num_frames=64, mask_patches=4)
    save_checkpoint(SsambaModel(config), tmp_path / "deep")  # twelve pairs: the last streams are far above 1
    assert check_upstream(tmp_path / "deep", wavs)["largest_difference"] < 1e-4
    right = SsambaModel.extract_features  # S3PRL's and our own both stand on it; only one of the two is disturbed
    monkeypatch.setattr(
        SsambaFrames, "extract_features", lambda self, *args: right(self.model, args[0], args[1], "mean")
    )
    with pytest.raises(ValueError, match=r"layer 0 of \S+train0.wav differs by"):
        check_upstream(undisturbed[1] / "last", wavs)


def test_wrong_upstream_folders_are_named(tmp_path):
    from s3prl_upstream.ssamba.hubconf import ssamba

    with pytest.raises(ValueError, match="ssamba needs path_or_url"):
        ssamba()
    with pytest.raises(ValueError, match="no such folder"):
        ssamba(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="config.json and model.safetensors missing"):
        ssamba(str(tmp_path))
    with pytest.raises(ValueError, match="'sum' is not one of: concat mean"):
        ssamba(str(tmp_path), frames="sum")


def test_a_mistake_on_the_command_line_is_one_line(tmp_path, monkeypatch, capsys):
    from espnet_mamba.bin import ssamba_train
    from espnet_mamba.bin.cli import run_main

    words = ["ssamba_train", "--model", "none.yaml", "--ngpu", "0", "--dry_run", "true", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as exit_status:
        run_main(ssamba_train.main)
    assert exit_status.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: model 'none': no file")
