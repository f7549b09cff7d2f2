"""One body of tests for every model of conf/models at its tiny size."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from espnet_mamba.layers.packing import Packing, pack_waveforms
from espnet_mamba.models.config import load_config
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.models.pretraining import HubertForPretraining
from espnet_mamba.ops.selection import relative_error

CONFIGS = sorted((Path(__file__).parents[1] / "conf/models").glob("*_tiny*.yaml"))
SAMPLES = [9000, 5000, 400]
FRAMES = [(n - 400) // 320 + 1 for n in SAMPLES]


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def config(request):
    return load_config(request.param)


@pytest.fixture
def model(config):
    return HubertModel(config).eval()


def batch():
    wavs, num_samples = torch.randn(3, max(SAMPLES)) * 0.1, torch.tensor(SAMPLES)
    alone = [wavs[i : i + 1, :n].clone() for i, n in enumerate(SAMPLES)]
    for i, n in enumerate(SAMPLES):
        wavs[i, n:] = float("nan")
    return wavs, num_samples, alone


def test_gradients_reach_every_parameter(config):
    config = dataclasses.replace(config, layer_drop=0.0)
    model = HubertForPretraining(config, num_classes=7)
    output = model(torch.randn(2, 8000) * 0.1, torch.randint(0, 7, (2, 24)))
    (output.loss_sum + output.feature_penalty).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        # a key's bias moves all scores of a query alike, which the softmax does not see
        assert parameter.grad.abs().sum() > 0 or name.endswith("k_proj.bias"), name


def test_padding_batch_mates_and_order_change_nothing(model):
    wavs, num_samples, alone = batch()
    together = model(wavs, num_samples)
    assert together.num_frames.tolist() == FRAMES
    order = [2, 0, 1]
    again = model(wavs[order], num_samples[order])
    for i, n in enumerate(FRAMES):
        for layer, other, own in zip(
            together.hidden_states, again.hidden_states, model(alone[i]).hidden_states, strict=True
        ):
            torch.testing.assert_close(layer[i, :n], own[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(other[order.index(i), :n], own[0], rtol=1e-4, atol=1e-5)


def test_padding_changes_no_gradient(model):
    wavs, num_samples, alone = batch()
    weight = torch.randn(3, max(FRAMES), model.config.embed_dim)  # a sum of squares of layer norms has no gradient
    padding = ~Packing(torch.tensor(FRAMES)).valid[..., None]
    (model(wavs, num_samples).hidden_states[-1] * weight).masked_fill(padding, 0.0).sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, one in enumerate(alone):
        (model(one).hidden_states[-1] * weight[row, : FRAMES[row]]).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert relative_error(together[name], parameter.grad) < 1e-4 or name.endswith("k_proj.bias"), name


def test_packed_row_is_one_by_one(model):
    _, num_samples, alone = batch()
    row = pack_waveforms([one[0] for one in alone], model.config.downsample_rate)
    packed = model(row, num_samples, packed=True)
    assert packed.num_frames.tolist() == FRAMES and packed.hidden_states[0].shape[:2] == (1, sum(FRAMES))
    one_by_one = [model(one) for one in alone]
    for index, layer in enumerate(packed.hidden_states):
        expected = torch.cat([output.hidden_states[index] for output in one_by_one], dim=1)
        torch.testing.assert_close(layer, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(packed.conv_features, torch.cat([o.conv_features for o in one_by_one], 1))


def test_no_gradient_comes_from_beyond_the_declared_look_ahead(model):
    wavs = (torch.randn(1, 8000) * 0.1).requires_grad_()
    frame = 10
    output = model(wavs).hidden_states[-1][0, frame]
    (gradient,) = torch.autograd.grad(output.square().sum(), wavs)
    end = frame * 320 + 400  # the frame's own window
    if math.isinf(model.look_ahead_ms):
        assert gradient[0, end + 320 :].abs().sum() > 0 and model.look_ahead.startswith("unbounded (")
    else:
        assert (gradient[0, end + int(model.look_ahead_ms * 16) :] == 0).all()
        assert gradient[0, end - 40 : end].abs().sum() > 0


def test_blocks_in_chunks_equal_the_whole(model):
    if not hasattr(model.blocks[0].mixer, "start_state"):
        with pytest.raises(ValueError, match="in chunks"):
            model.blocks[0](torch.zeros(1, 4, model.config.embed_dim), state=())
        return
    x = torch.randn(2, 70, model.config.embed_dim)
    cuts = sorted(torch.randperm(69)[:6].add(1).tolist())
    for ends in ([*range(1, 71)], [*range(3, 70, 3), 70], [16, 32, 48, 64, 70], [64, 70], [*cuts, 70]):
        y, begin = [], 0
        states = [block.mixer.start_state(2) for block in model.blocks]
        for end in ends:
            part = x[:, begin:end]
            for index, block in enumerate(model.blocks):
                part, states[index] = block(part, state=states[index])
            y.append(part)
            begin = end
        whole = x
        for block in model.blocks:
            whole, _ = block(whole)
        torch.testing.assert_close(torch.cat(y, 1), whole, rtol=1e-4, atol=1e-5)


def test_silence_and_a_minute_in_bfloat16_are_finite(model):
    assert all(torch.isfinite(h).all() for h in model(torch.zeros(1, 16000)).hidden_states)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        hidden_states = model(torch.randn(1, 60 * 16000) * 0.1).hidden_states
    assert all(torch.isfinite(h).all() for h in hidden_states) and hidden_states[-1].shape[1] == 2999
