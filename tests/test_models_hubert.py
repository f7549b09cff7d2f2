import dataclasses
import json
import math

import pytest
import torch

from espnet_mamba.layers.packing import pack_waveforms
from espnet_mamba.models.checkpoints import load_checkpoint, save_checkpoint
from espnet_mamba.models.config import HubertConfig, config_from_dict, config_to_dict, load_config
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.models.masking import span_mask
from espnet_mamba.models.pretraining import HubertForPretraining

TINY = HubertConfig(
    name="test",
    conv_layers=((8, 10, 5),) + ((8, 3, 2),) * 4 + ((8, 2, 2),) * 2,
    embed_dim=16,
    num_layers=2,
    state_size=4,
    expand=2,
    position_kernel=8,
    position_groups=4,
)
CAUSAL = dataclasses.replace(TINY, mixer="mamba", front_end="conv_layer", position="causal_conv")


@pytest.mark.parametrize("config", [TINY, CAUSAL, dataclasses.replace(TINY, ffn_dim=32, norm="pre", position="none")])
def test_padding_filled_with_nan_changes_nothing(config):
    model = HubertModel(config).eval()
    wavs, num_samples = torch.randn(3, 9000) * 0.1, torch.tensor([9000, 5000, 400])
    alone = [model.extract_features(wavs[i : i + 1, :n])[0] for i, n in enumerate(num_samples.tolist())]
    for i, n in enumerate(num_samples.tolist()):
        wavs[i, n:] = float("nan")
    together, num_frames = model.extract_features(wavs, num_samples)
    assert num_frames.tolist() == [(n - 400) // 320 + 1 for n in num_samples.tolist()]
    assert len(together) == config.num_layers + 1
    for i, frames in enumerate(num_frames.tolist()):
        for layer, expected in zip(together, alone[i], strict=True):
            torch.testing.assert_close(layer[i, :frames], expected[0], rtol=1e-4, atol=1e-5)


def changed_before(model, sample):
    """Does any frame whose window ends at or before `sample` change when the audio from `sample` on does?"""
    wavs = torch.randn(1, 8000) * 0.1
    changed = wavs.clone()
    changed[:, sample:] += 0.3
    frames = (sample - 400) // 320 + 1
    pairs = zip(model.extract_features(wavs)[0], model.extract_features(changed)[0], strict=True)
    return [not torch.equal(a[:, :frames], b[:, :frames]) for a, b in pairs]


def test_look_ahead_is_what_the_model_says():
    causal = HubertModel(CAUSAL).eval()
    assert causal.look_ahead_ms == 0 and not any(changed_before(causal, 4000))
    centred = HubertModel(dataclasses.replace(CAUSAL, position="conv")).eval()
    assert centred.look_ahead_ms == 3 * 20 and all(changed_before(centred, 4000))  # 8 taps: 3 frames ahead
    group = HubertModel(dataclasses.replace(CAUSAL, front_end="conv_group")).eval()
    assert math.isinf(group.look_ahead_ms) and all(changed_before(group, 4000))
    assert math.isinf(HubertModel(TINY).look_ahead_ms)


def test_base_has_the_parameters_of_paper_2s_public_config(root):
    model = HubertForPretraining(load_config(root / "conf/models/extbimamba_base.yaml"), num_classes=504)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 146.74  # docs/papers.md 4


def test_every_model_yaml_builds(root):
    for path in sorted((root / "conf/models").glob("*.yaml")):
        config = load_config(path)
        with torch.device("meta"):
            HubertModel(config)
        assert config.downsample_rate == 320 and config.receptive_field == 400, path
        assert config.name == path.stem


def test_mask_covers_55_percent_and_no_padding():
    num_frames = torch.tensor([500] * 64 + [30, 12, 5, 1])
    mask = span_mask(num_frames, 500)
    assert abs(mask[:64].float().mean().item() - 0.55) < 0.02  # docs/papers.md 5
    assert not (mask & (torch.arange(500) >= num_frames[:, None])).any()
    assert mask.any(1).all()
    runs = mask[0].int().diff(prepend=torch.zeros(1), append=torch.zeros(1))
    starts, ends = (runs == 1).nonzero().flatten(), (runs == -1).nonzero().flatten()
    assert ((ends - starts) >= 10).all()


@pytest.mark.parametrize(
    ("frames", "least", "most"),
    [(20, 0.65, 0.75), (30, 0.54, 0.62), (50, 0.54, 0.60), (200, 0.54, 0.58), (500, 0.54, 0.58), (1500, 0.54, 0.58)],
)
def test_mask_fraction_at_every_length(frames, least, most):
    """About 55 %; at 20 frames HuBERT's least number of spans, 2 of 10 frames, covers 70 %."""
    mask = span_mask(torch.full((2000,), frames), frames)
    assert least < mask.float().mean().item() < most


def test_masks_are_valid_from_one_frame_on():
    for frames in range(1, 60):
        mask = span_mask(torch.full((20,), frames), 64)
        assert mask.any(1).all() and not mask[:, frames:].any()


def test_loss_reads_masked_frames_only():
    model = HubertForPretraining(dataclasses.replace(TINY, dropout=0.0, dropout_input=0.0, layer_drop=0.0), 7)
    wavs, labels = torch.randn(2, 6800) * 0.1, torch.randint(0, 7, (2, 21))
    draw = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    mask = span_mask(torch.tensor([21, 21]), 21, generator=draw())
    first = model(wavs, labels, generator=draw())
    other = torch.where(mask, labels, (labels + 1) % 7)
    second = model(wavs, other, generator=draw())
    assert first.loss_sum == second.loss_sum and int(first.num_masked) == int(mask.sum())
    conv = model.hubert(wavs).conv_features
    torch.testing.assert_close(first.feature_penalty, conv.square().mean())
    with pytest.raises(ValueError, match="labels have 20 frames, the audio has 21"):
        model(wavs, labels[:, :20])


def test_padded_batch_has_the_loss_of_its_utterances():
    model = HubertForPretraining(TINY, 7).eval()
    wavs, labels = torch.randn(2, 6800) * 0.1, torch.randint(0, 7, (2, 21))
    num_samples = torch.tensor([6800, 3600])  # 21 and 11 frames
    together = model.hubert(wavs, num_samples)
    penalty = model(wavs, labels, num_samples).feature_penalty
    alone = [model.hubert(wavs[i : i + 1, :n]).conv_features.square().mean(-1) for i, n in enumerate((6800, 3600))]
    torch.testing.assert_close(penalty, torch.cat([a.flatten() for a in alone]).mean())
    assert together.num_frames.tolist() == [21, 11]


def test_packed_row_has_the_loss_of_its_utterances():
    model = HubertForPretraining(dataclasses.replace(TINY, layer_drop=0.0), 7).eval()
    wavs = [torch.randn(n) * 0.1 for n in (6800, 3600)]  # 21 and 11 frames
    labels, num_samples = torch.randint(0, 7, (1, 32)), torch.tensor([6800, 3600])
    packed = model(pack_waveforms(wavs, 320), labels, num_samples, torch.Generator().manual_seed(3))
    padded_labels = torch.zeros(2, 21, dtype=torch.long)
    padded_labels[0], padded_labels[1, :11] = labels[0, :21], labels[0, 21:]
    padded_wavs = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    padded = model(padded_wavs, padded_labels, num_samples, torch.Generator().manual_seed(3))
    for one, other in zip(packed, padded, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="labels have 31 frames, the packed audio has 32"):
        model(pack_waveforms(wavs, 320), labels[:, :31], num_samples)


def test_front_end_gradient_is_scaled():
    wavs = torch.randn(1, 4000) * 0.1
    grads = []
    for scale in (1.0, 0.1):
        torch.manual_seed(1)
        model = HubertModel(dataclasses.replace(TINY, feature_grad_scale=scale)).eval()
        model(wavs).hidden_states[-1].sum().backward()
        grads.append(model.front_end.convs[0].weight.grad)
    torch.testing.assert_close(grads[1], grads[0] * 0.1)


def test_too_short_has_no_frames_and_is_said_once(caplog):
    model = HubertModel(TINY).eval()
    output = model(torch.zeros(2, 399))
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, 0, 16)] * 3 and output.num_frames.tolist() == [0, 0]
    wavs = torch.randn(2, 4000)
    output = model(wavs, torch.tensor([4000, 399]))
    assert output.num_frames.tolist() == [12, 0]
    for layer, alone in zip(output.hidden_states, model(wavs[:1]).hidden_states, strict=True):
        torch.testing.assert_close(layer[:1], alone, rtol=1e-4, atol=1e-5)
        assert torch.isfinite(layer).all()
    messages = [r.message for r in caplog.records if "shorter than one frame" in r.message]
    assert messages == ["an utterance of 399 samples is shorter than one frame (400 samples, 25 ms) and has none"]


def test_checkpoint_round_trip(tmp_path):
    model = HubertModel(TINY).eval()
    save_checkpoint(model, tmp_path / "m")
    save_checkpoint(model, tmp_path / "m")  # over what is there
    again = load_checkpoint(tmp_path / "m")
    wavs = torch.randn(1, 4000)
    assert torch.equal(model(wavs).hidden_states[-1], again(wavs).hidden_states[-1])
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_checkpoint_of_another_architecture_is_refused(tmp_path):
    save_checkpoint(HubertModel(TINY), tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(ValueError, match=r"missing blocks\.2\..*in all"):
        load_checkpoint(tmp_path / "m")
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"format": "other"}))
    with pytest.raises(ValueError, match="another kind of model"):
        load_checkpoint(tmp_path / "m")
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    (tmp_path / "m/model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="not readable"):
        load_checkpoint(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="no model folder"):
        load_checkpoint(tmp_path)


def test_config_errors_name_the_nearest(tmp_path, root):
    assert config_from_dict(config_to_dict(TINY), "here") == TINY
    with pytest.raises(ValueError, match="unknown key 'embed_dims'; did you mean 'embed_dim'"):
        config_from_dict({"embed_dims": 3}, "x.yaml")
    with pytest.raises(FileNotFoundError, match="did you mean 'extbimamba_tiny'"):
        load_config(root / "conf/models/exbimamba_tiny.yaml")
