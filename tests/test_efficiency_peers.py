"""Peers have the sizes and the output that they are said to have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from espnet_mamba.bin.efficiency import MODELS
from espnet_mamba.efficiency.entries import entry_of_config
from espnet_mamba.efficiency.peers import own_peers, slow_mamba
from espnet_mamba.efficiency.streaming_cost import can_stream
from espnet_mamba.models.config import load_config
from espnet_mamba.models.sizing import count_parameters

BASE = sum(count_parameters(load_config(MODELS / "transformer_base.yaml")).values())


def num_parameters(build):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())


def test_torchaudios_hubert_is_as_large_as_ours():
    build = own_peers(MODELS)["torchaudio_hubert_base"].build
    assert num_parameters(build) == BASE - 768  # it holds no mask embedding


def test_hugging_faces_hubert_is_as_large_as_ours():
    pytest.importorskip("transformers")
    assert num_parameters(own_peers(MODELS)["hf_hubert_base:eager"].build) == BASE


def test_transformers_slow_mamba_computes_what_ours_does():
    pytest.importorskip("transformers")
    config = replace(load_config(MODELS / "mamba_tiny.yaml"), num_layers=2, embed_dim=32, position="none", dropout=0.0)
    ours, other = entry_of_config(config).build().eval(), slow_mamba(config).eval()
    weights = {name.replace(".mixer.", ".mixer.layer."): value for name, value in ours.state_dict().items()}
    other.load_state_dict(weights)
    wavs = torch.randn(1, 8000)
    assert not can_stream(other)
    with torch.inference_mode():
        expected, actual = ours.extract_features(wavs)[0], other.extract_features(wavs)[0]
    torch.testing.assert_close(actual[-1], expected[-1], atol=1e-4, rtol=1e-3)


@pytest.mark.espnet
@pytest.mark.parametrize("name", ["conformer", "e_branchformer"])
def test_espnets_encoders_are_as_large_as_hubert_base_and_give_its_frames(name):
    from espnet_mamba.asr import peer_encoders

    build = getattr(peer_encoders, name)
    small, wavs = build(num_blocks=1).eval(), torch.randn(2, 8000)
    each = num_parameters(lambda: build(num_blocks=2)) - num_parameters(lambda: build(num_blocks=1))
    assert num_parameters(lambda: build(num_blocks=1)) + 11 * each == pytest.approx(BASE, rel=0.01)
    with torch.inference_mode():
        layers, lengths = small.extract_features(wavs)
    assert layers[-1].shape == (2, 24, peer_encoders.WIDTH) and lengths.tolist() == [24, 24]
