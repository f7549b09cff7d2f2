"""Model folders of either kind behind one door: what S3PRL calls them, their layers at 50 Hz, export and cost."""

import csv
import json
from dataclasses import replace

import pytest
import torch
from test_downstream_upstream import TINY
from test_models_ssamba import LENGTHS, SINGLE, SMALL, batch_of, speech
from torch.utils.flop_counter import FlopCounterMode

from espnet_mamba.asr.preparation import system_config
from espnet_mamba.asr.systems import System
from espnet_mamba.efficiency.entries import open_entries
from espnet_mamba.efficiency.macs import SCAN_MACS, count_ssamba_macs
from espnet_mamba.efficiency.settings import EfficiencySettings
from espnet_mamba.efficiency.stage import run_efficiency
from espnet_mamba.models import checkpoints
from espnet_mamba.models.folders import export_upstream, load_layers, load_model, upstream_name
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.models.model_folder import read_config, read_weights, write_folder
from espnet_mamba.models.ssamba.checkpoints import load_checkpoint, save_checkpoint
from espnet_mamba.models.ssamba.frames import SsambaFrames
from espnet_mamba.models.ssamba.model import SsambaModel
from espnet_mamba.ops.selection import FORCE
from espnet_mamba.targets.features import open_features


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("folders")
    checkpoints.save_checkpoint(HubertModel(TINY), where / "hubert")
    save_checkpoint(SsambaModel(SINGLE), where / "ssamba")
    return where


def test_s3prls_name_follows_the_format(folders, tmp_path):
    assert upstream_name(folders / "hubert") == "mamba_hubert"
    assert upstream_name(folders / "ssamba") == "ssamba_50hz"
    with pytest.raises(FileNotFoundError, match="no model folder .config.json is missing.; stage 7"):
        upstream_name(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "another"}')
    with pytest.raises(ValueError, match="not a config of 'espnet-mamba HubertModel' or 'espnet-mamba SsambaModel'"):
        load_model(tmp_path)


def test_a_huberts_layers_are_its_own(folders):
    loaded, model = load_layers(folders / "hubert"), checkpoints.load_checkpoint(folders / "hubert")
    assert isinstance(loaded.model, HubertModel)
    assert (loaded.num_layers, loaded.width, loaded.hop) == (3, 16, 320)
    source = open_features(str(folders / "hubert"))
    wavs, num_samples = batch_of(LENGTHS, tail=0.0)
    found, frames = source(wavs, num_samples)
    with torch.no_grad():
        expected, lengths = model.extract_features(wavs, num_samples)
    assert torch.equal(frames, lengths) and source.names == ["layer0", "layer1", "layer2"] and source.dims == [16] * 3
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_ssambas_frames_are_its_columns_at_huberts_times(folders):
    source = open_features(str(folders / "ssamba"))
    assert (source.hop, source.names, source.dims) == (320, ["layer0", "layer1", "layer2"], [16] * 3)
    wavs, num_samples = batch_of(LENGTHS)
    found, frames = source(wavs, num_samples)
    assert frames.tolist() == [(length - 400) // 320 + 1 for length in LENGTHS]
    with torch.no_grad():
        columns, _ = load_checkpoint(folders / "ssamba").extract_features(wavs, num_samples, "mean")
    for row, count in enumerate(frames.tolist()):
        for few, many in zip(columns, found, strict=True):
            for frame in range(count):
                assert torch.equal(many[row, frame], few[row, frame // 8])
            assert many[row, :count].abs().amax(dim=1).min() > 0  # none of them lies behind the last column


@pytest.mark.parametrize("num_samples", [1, 399, 400, 719, 720, 2799, 2800, 2960, 5119, 5120, 5519, 5520])
def test_every_50_hz_frame_has_a_column(folders, num_samples):
    found, frames = open_features(str(folders / "ssamba"))(speech(num_samples)[None], torch.tensor([num_samples]))
    count = max(0, (num_samples - 400) // 320 + 1)
    assert frames.tolist() == [count] and found[-1].shape == (1, count, 16)
    assert (found[-1].abs().amax(dim=2) > 0).all()


def test_columns_that_are_no_whole_frames_are_refused():
    with pytest.raises(ValueError, match="a column of 800 samples cannot be cut into frames of 320"):
        SsambaFrames(SsambaModel(replace(SMALL, num_frames=60, patch_size=(16, 5))))


def test_export_keeps_the_kind_and_makes_its_control(folders, tmp_path):
    for kind, model in (("hubert", HubertModel), ("ssamba", SsambaModel)):
        exported = export_upstream(folders / kind, tmp_path / kind, tmp_path / f"{kind}_random", seed=7)
        assert isinstance(exported, model) and isinstance(load_model(tmp_path / f"{kind}_random"), model)
        weights = load_model(folders / kind).state_dict()
        assert all(torch.equal(weights[k], v) for k, v in load_model(tmp_path / kind).state_dict().items())
        control = load_model(tmp_path / f"{kind}_random").state_dict()
        assert any(not torch.equal(weights[k], v) for k, v in control.items())


def test_the_recogniser_is_told_the_upstream_and_its_width(folders, root):
    base = root / "conf/asr/train_conformer_tiny.yaml"
    for kind, name in (("hubert", "mamba_hubert"), ("ssamba", "ssamba_50hz")):
        config = system_config(base, System("pretrained", folders / kind), folders, {})
        upstream = config["frontend_conf"]["frontend_conf"]
        assert upstream == {"upstream": name, "path_or_url": str(folders / kind)}
        assert config["preencoder_conf"]["input_size"] == 16


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, share_conv=True)], ids=["two convolutions", "one"])
@pytest.mark.parametrize("num_samples", [400, 16000, 33333])
def test_formula_agrees_with_the_flop_counter(config, num_samples, monkeypatch):
    monkeypatch.setenv(FORCE, "torch")  # PyTorch's counter does not see compiled kernels
    model, wav = SsambaModel(config).eval(), speech(num_samples)[None]
    features, grid = model.features(wav)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode(features, grid)
    flops = counter.get_flop_counts()["Global"]
    known = sum(v for op, v in flops.items() if "convolution" in str(op) or str(op) in ("aten.mm", "aten.addmm")) // 2
    parts = count_ssamba_macs(config, num_samples)
    assert known == sum(parts.values()) - parts["scan"] - parts["front_end"]  # the filterbanks were made before
    tokens = 1 + 2 * grid.total
    assert parts["scan"] == config.depth * tokens * 2 * (2 * 16) * 4 * SCAN_MACS


def test_efficiency_measures_both_kinds(folders, tmp_path):
    entries = open_entries([str(folders / "hubert"), str(folders / "ssamba")], [], tmp_path, {})
    run_efficiency(entries, EfficiencySettings((0.5, 1.0), ("eval",), 0.0, repeats=1), tmp_path)
    rows = list(csv.DictReader(open(tmp_path / "efficiency.csv")))
    assert [row["model"] for row in rows] == ["test", "test", "small", "small"]
    assert all(float(row["wall_median"]) > 0 and int(row["macs_per_second"]) > 0 for row in rows)
    assert json.loads((tmp_path / "efficiency.json").read_text())["batch"] == 1
    with pytest.raises(ValueError, match="399 samples are shorter than one frame"):
        count_ssamba_macs(SMALL, 399)


def test_a_folder_is_replaced_whole_even_when_the_old_one_cannot_be_deleted(tmp_path, monkeypatch):
    write_folder(tmp_path / "m", {"format": "f", "width": 1}, {"w": torch.zeros(2)}, "first")

    def die(path, ignore_errors=False):
        if str(path).endswith(".old"):
            raise KeyboardInterrupt

    monkeypatch.setattr("espnet_mamba.models.model_folder.shutil.rmtree", die)
    with pytest.raises(KeyboardInterrupt):  # killed while the old one is deleted
        write_folder(tmp_path / "m", {"format": "f", "width": 2}, {"w": torch.ones(2)}, "second")
    assert read_config(tmp_path / "m", "f") == {"width": 2}
    assert torch.equal(read_weights(tmp_path / "m", {"w": torch.zeros(2)})["w"], torch.ones(2))
