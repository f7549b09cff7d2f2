"""Our Transformer HuBERT against code that nobody here wrote: transformers' HubertModel and torchaudio's hubert_base.

Weights travel through the converter, so a difference may be a name as well as a formula.
"""

import pytest
import torch

from espnet_mamba.models.checkpoints import load_checkpoint
from espnet_mamba.models.config import BASE_CONV_LAYERS
from espnet_mamba.models.convert import convert

transformers = pytest.importorskip("transformers")
torchaudio = pytest.importorskip("torchaudio")

NARROW = {"hidden_size": 48, "intermediate_size": 96, "num_conv_pos_embeddings": 16, "conv_dim": [16] * 7}
CONVS = [(16, kernel, stride) for _, kernel, stride in BASE_CONV_LAYERS]


@torch.no_grad()
def unlike_start(model):
    """Move every parameter from where it starts: a norm that is never read would not be missed at weight 1, bias 0."""
    for parameter in model.parameters():
        scale = 0.02 if parameter.ndim > 1 else 0.1
        parameter.add_(scale * torch.randn_like(parameter))
    return model.eval()


def transformers_hubert(attention="sdpa", **sizes):
    config = transformers.HubertConfig(attn_implementation=attention, mask_time_prob=0.05, **sizes)
    return unlike_start(transformers.HubertModel(config))


def torchaudio_hubert(norm_first=False):
    return unlike_start(
        torchaudio.models.wav2vec2_model(
            "group_norm", CONVS, False, 48, 0.1, 16, 16, 12, 12, 0.1, 96, 0.0, 0.1, norm_first, 0.05, None
        )
    )


def largest_difference(ours, theirs):
    assert len(ours) == len(theirs)
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def torchaudio_states(model, wavs):
    """All 13: torchaudio's own list leaves out what enters the first layer."""
    entering = []
    hook = model.encoder.transformer.layers[0].register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    states, _ = model.extract_features(wavs)
    hook.remove()
    return entering + states


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_all_hidden_states_equal_transformers(tmp_path, attention):
    theirs = transformers_hubert(attention, **NARROW)
    theirs.save_pretrained(tmp_path / "hf")
    result = convert(tmp_path / "hf", tmp_path / "ours")
    assert result.kind == "Hugging Face HubertModel" and not result.dropped and not result.notes
    ours = load_checkpoint(tmp_path / "ours")
    for samples in (400, 719, 16000):  # 1, 1 and 49 frames
        wavs = torch.randn(2, samples) * 0.1
        with torch.no_grad():
            expected = theirs(wavs, output_hidden_states=True).hidden_states
            states, lengths = ours.extract_features(wavs)
        assert largest_difference(states, expected) < 1e-5 and len(states) == 13
        assert lengths.tolist() == theirs._get_feat_extract_output_lengths(torch.tensor([samples] * 2)).tolist()


def test_all_hidden_states_equal_torchaudio(tmp_path):
    theirs = torchaudio_hubert()
    torch.save(theirs.state_dict(), tmp_path / "ta.pt")
    result = convert(tmp_path / "ta.pt", tmp_path / "ours")
    assert result.kind == "torchaudio HuBERT" and [note.split(":")[0] for note in result.notes] == [
        "mixer",
        "num_heads",
        "mask_embedding",
    ]
    ours = load_checkpoint(tmp_path / "ours")
    for samples in (400, 719, 16000):
        wavs = torch.randn(2, samples) * 0.1
        with torch.no_grad():
            states, lengths = ours.extract_features(wavs)
            expected = torchaudio_states(theirs, wavs)
        assert largest_difference(states, expected) < 1e-5 and len(states) == 13
        assert lengths.tolist() == theirs.extract_features(wavs, torch.tensor([samples] * 2))[1].tolist()


@torch.no_grad()
def test_padded_batch_with_a_layer_norm_front_end_equals_transformers(tmp_path):
    """Batched, their group norm counts the padding (wrong, and ours does not); their layer norm sees no other frame."""
    theirs = transformers_hubert(**NARROW, feat_extract_norm="layer")
    theirs.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours")
    num_samples = torch.tensor([9000, 5000, 400])
    wavs = torch.randn(3, 9000) * 0.1
    valid = torch.arange(9000) < num_samples[:, None]
    wavs = wavs * valid
    expected = theirs(wavs, attention_mask=valid.long(), output_hidden_states=True).hidden_states
    states, lengths = load_checkpoint(tmp_path / "ours").extract_features(wavs, num_samples)
    assert lengths.tolist() == theirs._get_feat_extract_output_lengths(num_samples).tolist()
    for i, frames in enumerate(lengths.tolist()):
        pairs = [layer[i, :frames] for layer in states], [layer[i, :frames] for layer in expected]
        assert largest_difference(*pairs) < 1e-5


@torch.no_grad()
def test_padded_batch_equals_their_utterances_one_at_a_time(tmp_path):
    """With the group norm: transformers and torchaudio are right only alone, there being no padding to be counted."""
    theirs = transformers_hubert(**NARROW)
    theirs.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours")
    num_samples = torch.tensor([9000, 5000, 400])
    wavs = torch.randn(3, 9000) * 0.1
    states, lengths = load_checkpoint(tmp_path / "ours").extract_features(wavs, num_samples)
    for i, (samples, frames) in enumerate(zip(num_samples.tolist(), lengths.tolist(), strict=True)):
        expected = theirs(wavs[i : i + 1, :samples], output_hidden_states=True).hidden_states
        assert largest_difference([layer[i : i + 1, :frames] for layer in states], expected) < 1e-5


@torch.no_grad()
def test_true_size_equals_both(tmp_path):
    """HuBERT Base as it is: 13 states of width 768, the same weights in all three."""
    theirs = transformers_hubert()
    theirs.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours")
    ours = load_checkpoint(tmp_path / "ours")
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    wavs = torch.randn(1, 8000) * 0.1
    states = ours(wavs).hidden_states
    assert largest_difference(states, theirs(wavs, output_hidden_states=True).hidden_states) < 1e-5
    with torch.device("meta"):
        third = torchaudio.models.hubert_base()
    weights = {f"encoder.{k}" if k.startswith("feature_proj") else k: v for k, v in theirs.state_dict().items()}
    weights = {
        k.replace("encoder.", "encoder.transformer.", 1) if not k.startswith(("encoder.feat", "feat")) else k: v
        for k, v in weights.items()
        if k != "masked_spec_embed"
    }
    third.load_state_dict(weights, assign=True)
    assert largest_difference(states, torchaudio_states(third.eval(), wavs)) < 1e-5
