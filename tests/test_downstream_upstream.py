"""The S3PRL upstream: its contract, its registration, and the wrapper that keeps it frozen."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from espnet_mamba.models.checkpoints import save_checkpoint
from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.hubert import HubertModel
from s3prl_upstream.frozen import FrozenUpstream
from s3prl_upstream.mamba_hubert.expert import UpstreamExpert
from s3prl_upstream.mamba_hubert.hubconf import mamba_hubert

TINY = HubertConfig(
    name="test",
    conv_layers=((8, 10, 5), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 3, 2), (8, 2, 2), (8, 2, 2)),
    embed_dim=16,
    num_layers=2,
    state_size=4,
    expand=2,
    position_kernel=8,
    position_groups=4,
    dropout=0.5,
    layer_drop=0.5,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("upstream") / "tiny"
    save_checkpoint(HubertModel(TINY), path)
    return path


@pytest.fixture(scope="module")
def expert(folder):
    return mamba_hubert(ckpt=str(folder), model_config=None, refresh=False)


def test_any_length_gives_a_frame_per_started_hop(expert):
    for samples in (1, 2, 319, 320, 321, 399, 400, 401, 719, 720, 960, 961, 1000, 1039, 1040, 1400):
        layers = expert([torch.randn(samples)])["hidden_states"]
        assert len(layers) == 3
        assert all(layer.shape == (1, -(-samples // 320), 16) and layer.isfinite().all() for layer in layers)


def test_batch_and_padding_change_nothing(expert):
    torch.manual_seed(1)
    wavs = [torch.randn(n) for n in (9000, 300, 5003, 1001)]
    together = expert(wavs)["hidden_states"]
    for row, wav in enumerate(wavs):
        alone = expert([wav])["hidden_states"]
        for one, many in zip(alone, together, strict=True):
            torch.testing.assert_close(many[row, : one.size(1)], one[0], atol=1e-5, rtol=1e-4)


def test_train_mode_is_refused_quietly(expert):
    wav = torch.randn(8000)
    before = expert([wav])["hidden_states"]
    expert.train()
    assert not any(module.training for module in expert.modules())
    after = expert([wav])["hidden_states"]
    assert len(after) == len(before)  # no layer dropped
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_copies_and_pickles_are_the_same_model(expert):
    wav = torch.randn(4000)
    expected = expert([wav])["hidden_states"][-1]
    for twin in (copy.deepcopy(expert), pickle.loads(pickle.dumps(expert))):
        assert twin is not expert and not twin.training
        assert torch.equal(twin([wav])["hidden_states"][-1], expected)


def test_construction_leaves_the_random_state_alone(folder):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    UpstreamExpert(folder)
    assert torch.equal(torch.rand(3), expected)


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="needs path_or_url"):
        mamba_hubert()
    with pytest.raises(ValueError, match="nowhere: no such folder; give the folder that the stage 'upstream' wrote"):
        mamba_hubert(ckpt=str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not an upstream folder, model.safetensors missing"):
        mamba_hubert(ckpt=str(tmp_path))


class CountingUpstream(nn.Module):
    """Two layers of 4-sample frames; counts the utterances that it computes."""

    num_layers, hidden_sizes, downsample_rates = 2, [3, 3], [4, 4]

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5)
        self.computed = 0

    def forward(self, wavs, lengths):
        self.computed += len(wavs)
        wavs = nn.functional.pad(wavs, (0, -wavs.size(1) % 4))
        x = self.dropout(self.linear(wavs.unflatten(1, (-1, 4))))
        frames = torch.div(lengths + 3, 4, rounding_mode="floor")
        return [x, 2 * x], [frames, frames]


def test_frozen_computes_each_utterance_once_and_exactly():
    torch.manual_seed(0)
    inner = CountingUpstream()
    frozen = FrozenUpstream(inner)
    frozen.train()
    lengths = torch.tensor([40, 17, 32])
    wavs = torch.randn(3, 40).masked_fill(torch.arange(40) >= lengths.unsqueeze(1), 0.0)
    first, frames = frozen(wavs, lengths)
    again, _ = frozen(wavs[[2, 0]], lengths[[2, 0]])
    assert inner.computed == 3 and frames[0].tolist() == [10, 5, 8]
    assert torch.equal(again[1][0, :8], first[1][2, :8]) and torch.equal(again[0][1], first[0][0])
    assert (first[0][1, 5:] == 0).all()
    expected, _ = inner.eval()(wavs[1:2, :17], lengths[1:2])
    torch.testing.assert_close(first[0][1, :5], expected[0][0])
    assert not first[0].requires_grad and not any(parameter.requires_grad for parameter in frozen.parameters())


def test_frozen_forgets_when_the_weights_change_and_only_then():
    inner = CountingUpstream()
    frozen = FrozenUpstream(inner)
    batch = torch.randn(1, 16), torch.tensor([16])
    old, _ = frozen(*batch)
    frozen.to("cpu")  # what a trainer does before each evaluation
    frozen(*batch)
    assert inner.computed == 1
    frozen.load_state_dict({name: value + 1 for name, value in frozen.state_dict().items()})
    new, _ = frozen(*batch)
    assert inner.computed == 2 and not torch.equal(old[0], new[0])


def test_frozen_keeps_to_its_memory():
    inner = CountingUpstream()
    frozen = FrozenUpstream(inner, cache_mb=1e-4)  # 104 bytes: one utterance of 4 frames, 2 layers, 3 floats
    for _ in range(2):
        frozen(torch.arange(32.0).reshape(2, 16), torch.tensor([16, 16]))
    assert inner.computed == 3 and frozen.used_bytes <= 104


GUARDED = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError(f"network: {args}")
socket.socket.connect = socket.getaddrinfo = refuse
"""


def run_guarded(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter in which any use of the network raises, and says so in the output."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", GUARDED + code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.espnet
def test_imports_touch_no_network_and_registration_needs_no_order(tmp_path, folder):
    """One process for three claims, because each import of ESPnet and S3PRL costs ten seconds."""
    code = f"""
import sys
import s3prl_upstream
assert "s3prl" not in sys.modules and "torch" not in sys.modules
import espnet2.tasks.asr
import s3prl.hub
from s3prl_upstream import hook
names = [name for name in s3prl.hub.options() if name.startswith(("mamba_", "ssamba"))]
wanted = ["mamba_hubert", "mamba_hubert_local", "ssamba", "ssamba_50hz", "ssamba_local", "ssamba_mean"]
assert sorted(names) == wanted, names
for name in names:
    delattr(s3prl.hub, name)
hook.install()  # S3PRL loaded first, we second
from s3prl.nn import S3PRLUpstream
model = S3PRLUpstream("mamba_hubert", path_or_url={str(folder)!r})
assert model.num_layers == 3 and model.downsample_rates == [320] * 3
s3prl.hub.mamba_hubert = print
try:
    hook.install()
except ValueError as error:
    assert "already has another upstream" in str(error)
else:
    raise AssertionError("a foreign name was overwritten")
print("all well")
"""
    done = run_guarded(code, NLTK_DATA="", XDG_CACHE_HOME=str(tmp_path), PYTHONPATH=".")
    assert "all well" in done.stdout, done.stdout + done.stderr
    assert "network:" not in done.stdout + done.stderr
    assert (tmp_path / "espnet_mamba" / "nltk_data" / "corpora" / "cmudict.zip").is_file()
