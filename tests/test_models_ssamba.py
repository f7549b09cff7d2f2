"""SSAMBA's encoder: both residual forms, directions, utterances of any length."""

import dataclasses
import math

import pytest
import torch

from espnet_mamba.models.ssamba.config import SsambaConfig
from espnet_mamba.models.ssamba.features import fbank
from espnet_mamba.models.ssamba.grid import PatchGrid, Reversal
from espnet_mamba.models.ssamba.model import SsambaModel

SMALL = SsambaConfig(
    name="small", embed_dim=16, depth=4, state_size=4, num_mel_bins=32, num_frames=64, mask_patches=4, drop_path=0.0
)  # 2 bands, 4 columns
SINGLE = dataclasses.replace(SMALL, residual="single")
LENGTHS = (21000, 9000, 12345, 700)  # samples: 9, 4, 5, 1 columns, so shorter, equal to and longer than the positions


def speech(num_samples, seed=0):
    """Harmonics of a moving pitch with a moving loudness, and a little noise."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(num_samples) / 16000
    low, depth, rate = torch.rand(3, generator=generator).tolist()
    phase = 2 * math.pi * (100 + 120 * low) * time + 8 * depth * torch.sin(2 * math.pi * (1 + 3 * rate) * time)
    tone = sum(torch.sin(k * phase) / k for k in range(1, 12)) * torch.sin(math.pi * 3 * time).abs()
    return 0.1 * tone + 0.003 * torch.randn(num_samples, generator=generator)


def batch_of(lengths, tail=float("nan")):
    wavs = torch.full((len(lengths), max(lengths)), tail)
    for row, length in enumerate(lengths):
        wavs[row, :length] = speech(length, seed=row)
    return wavs, torch.tensor(lengths)


def assert_near(found, expected, tolerance=1e-5):
    assert found.shape == expected.shape
    assert torch.isfinite(found).all()
    assert (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-6)


def test_residual_forms_by_hand_on_two_pairs():
    models = {}
    for config in (SMALL, SINGLE):
        torch.manual_seed(1)
        models[config.residual] = SsambaModel(config).eval()
    spectrogram, grid = torch.randn(1, 32, 64), PatchGrid([4], 2)
    blocks = models["single"].blocks
    with torch.no_grad():
        outputs = {name: model.encode(spectrogram, grid, directions=True) for name, model in models.items()}
        x = outputs["single"].hidden_states[0]
        first = blocks[0](x) + blocks[1](x.flip(1)).flip(1)
        for name, stream in (("doubled", 2 * x), ("single", x)):
            state = stream + first
            assert_near(outputs[name].hidden_states[1], state)
            ahead, back = blocks[2](state), blocks[3](state.flip(1)).flip(1)
            # the second pair reads the first one's stream and output: doubled, both are added twice
            final = state * (2 if name == "doubled" else 1) + ahead + back
            assert_near(outputs[name].hidden_states[2], final)
            assert_near(outputs[name].output, models[name].final_norm(final))
            assert_near(outputs[name].directions[1][0], ahead)
            assert_near(outputs[name].directions[1][1], back)
    assert len(outputs["single"].hidden_states) == 3 and len(outputs["single"].directions) == 2
    assert models["single"](speech(5000)[None]).directions == []


def test_doubled_stream_grows_by_two_per_pair():
    model = SsambaModel(dataclasses.replace(SMALL, depth=12)).eval()
    for block in model.blocks:
        torch.nn.init.zeros_(block.mixer.out_proj.weight)
    states = model(speech(9000)[None]).hidden_states
    for pair, state in enumerate(states):
        assert_near(state, states[0] * 2**pair)


@pytest.mark.parametrize("config", [SMALL, SINGLE])
def test_swapped_blocks_on_a_reversed_sequence_mirror_the_output(config):
    """The pair is symmetric in time: exchange its blocks' weights and reverse what enters, and all is reversed."""
    model = SsambaModel(config).eval()
    twin = SsambaModel(config).eval()
    weights = model.state_dict()
    swap = lambda name: name if not name.startswith("blocks.") else _swapped(name)  # noqa: E731
    twin.load_state_dict({name: weights[swap(name)] for name in weights})
    stream, grid = torch.randn(1, 9, 16), PatchGrid([4], 2)
    with torch.no_grad():
        first = model._run_blocks(stream, grid, False).output
        second = twin._run_blocks(stream.flip(1), grid, False).output
    assert_near(second.flip(1), first)


def _swapped(name):
    _, index, rest = name.split(".", 2)
    return f"blocks.{int(index) ^ 1}.{rest}"


def test_reversal_keeps_each_utterances_padding_behind():
    x = torch.arange(10.0).view(2, 5, 1)
    reverse = Reversal(torch.tensor([5, 3]), 5)
    assert reverse(x).flatten().tolist() == [4, 3, 2, 1, 0, 7, 6, 5, 8, 9]
    assert torch.equal(reverse(reverse(x)), x)


def test_drop_path_drops_whole_utterances_in_training_only():
    model = SsambaModel(dataclasses.replace(SINGLE, depth=2, drop_path=0.5))
    assert model.drop_rates == [0.0, 0.0, 0.5]
    stream, update = torch.zeros(400, 3, 2), torch.ones(400, 3, 2)
    dropped = model._add(stream, update, 2)
    assert set(dropped.unique().tolist()) == {0.0, 2.0} and torch.equal(dropped.amin((1, 2)), dropped.amax((1, 2)))
    assert 0.4 < float((dropped[:, 0, 0] == 0).float().mean()) < 0.6
    assert torch.equal(model.eval()._add(stream, update, 2), update)


def test_valid_patches_come_first_in_their_order():
    grid = PatchGrid([3, 1, 0], 2)
    patches = torch.arange(18.0).view(3, 2, 3, 1)
    tokens = grid.to_sequence(patches)
    assert tokens[..., 0].tolist() == [[0, 1, 2, 3, 4, 5], [6, 9, 0, 0, 0, 0], [0] * 6]
    assert grid.sequence_lengths(extra=1).tolist() == [7, 3, 1]
    assert torch.equal(grid.to_grid(tokens), patches * grid.valid[..., None])
    assert grid.to_columns(tokens)[0].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert grid.to_columns(tokens, "mean")[0].flatten().tolist() == [1.5, 2.5, 3.5]
    pair = PatchGrid([1], 2).to_columns(torch.tensor([[[1.0, 2], [3, 4]]]))
    assert pair.tolist() == [[[1, 2, 3, 4]]]  # the lowest band's vector first
    with pytest.raises(ValueError, match="'sum' is not one of: concat mean"):
        grid.to_columns(tokens, "sum")


def test_positions_are_cut_or_interpolated_per_utterance():
    learned = torch.tensor([0.0, 1, 2, 3, 10, 11, 12, 13])[:, None]  # 2 bands of 4 columns
    grid = PatchGrid([4, 2, 8], 2)
    start = grid.positions(learned, "start")[..., 0]
    assert start[0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13] + [0] * 8
    assert start[1].tolist() == [0, 1, 10, 11] + [0] * 12
    assert grid.positions(learned, "centre")[1, :4, 0].tolist() == [1, 2, 11, 12]
    assert start[2, :8].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]


@pytest.mark.parametrize("config", [SMALL, SINGLE, dataclasses.replace(SINGLE, position_cut="centre", join="sum")])
def test_padding_filled_with_nan_changes_nothing(config):
    model = SsambaModel(config).eval()
    wavs, num_samples = batch_of(LENGTHS)
    with torch.no_grad():
        together, num_columns = model.extract_features(wavs, num_samples)
        order = torch.tensor([2, 0, 3, 1])
        reordered, _ = model.extract_features(wavs[order], num_samples[order])
        alone = [model.extract_features(wavs[i : i + 1, :n])[0] for i, n in enumerate(LENGTHS)]
    assert num_columns.tolist() == [9, 4, 5, 1] and len(together) == 3
    assert together[0].shape == (4, 9, 32)
    for i, columns in enumerate(num_columns.tolist()):
        for layer, expected in enumerate(alone[i]):
            assert_near(together[layer][i, :columns], expected[0])
            assert torch.equal(together[layer][i, columns:], torch.zeros(9 - columns, 32))
    for layer, state in enumerate(reordered):
        assert_near(state, together[layer][order])


def test_too_short_has_no_frames_and_says_so_once(caplog):
    model = SsambaModel(SMALL).eval()
    states, num_columns = model.extract_features(torch.zeros(1, 399))
    assert num_columns.tolist() == [0] and states[0].shape == (1, 0, 32)
    wavs, num_samples = batch_of((9000, 20))
    both, num_columns = model.extract_features(wavs, num_samples)
    assert num_columns.tolist() == [4, 0] and torch.isfinite(both[-1]).all()
    assert sum("shorter than one frame" in record.message for record in caplog.records) <= 1


def test_silence_and_a_minute_in_bfloat16_are_finite():
    model = SsambaModel(SINGLE).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert all(torch.isfinite(state).all() for state in model.extract_features(torch.zeros(1, 16000))[0])
        assert all(torch.isfinite(state).all() for state in model.extract_features(speech(960_000)[None])[0])


def test_fbank_is_normalised_and_blind_to_a_constant_offset():
    wav = speech(8000)
    energies = fbank(wav)
    assert energies.shape == (48, 128)
    assert_near(fbank(wav + 0.05)[1:], energies[1:], 1e-3)
    quiet = torch.finfo(torch.float32).eps
    floor = (math.log(quiet) + 4.2677393) / (2 * 4.5689974)
    torch.testing.assert_close(fbank(torch.zeros(400)), torch.full((1, 128), floor))
