"""Features of S3PRL upstreams and of trained recognisers on one grid of frames, untouched by batch mates."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
import torch
import yaml
from test_downstream_upstream import TINY

from espnet_mamba.data.manifest import Utterance
from espnet_mamba.models.checkpoints import save_checkpoint
from espnet_mamba.models.hubert import HubertModel
from s3prl_upstream.features import one_by_one, to_grid


def test_grid_takes_the_last_frame_that_begins_no_later():
    slow, same, fast = torch.arange(4.0)[:, None], torch.arange(8.0)[:, None], torch.arange(20.0)[:, None]
    found = to_grid([slow, same, fast], [640, 320, 160], num_samples=400 + 5 * 320 + 7)
    assert found[0][:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert found[1][:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert found[2][:, 0].tolist() == [0, 2, 4, 6, 8, 10]
    assert to_grid([slow[:1]], [2560], num_samples=2000)[0][:, 0].tolist() == [0] * 6  # a short last column
    assert to_grid([slow], [320], num_samples=399)[0].shape == (0, 1)


def test_one_by_one_shows_no_padding_to_the_model():
    def whole_mean(wav):
        return [wav.mean().expand(len(wav) // 320, 2)]

    wavs, samples = torch.ones(2, 3200), torch.tensor([3200, 1700])
    wavs[1, 1700:] = torch.nan
    layers, counts = one_by_one(whole_mean, wavs, samples, [320], None)
    assert counts.tolist() == [10, 5] and layers[0].shape == (2, 10, 2)
    assert (layers[0][1, :5] == 1).all() and (layers[0][1, 5:] == 0).all()


LENGTHS = (9000, 16000, 5003, 12100)


@pytest.fixture(scope="module")
def utterances(tmp_path_factory):
    folder, found = tmp_path_factory.mktemp("wav"), []
    torch.manual_seed(3)
    for index, length in enumerate(LENGTHS):
        soundfile.write(folder / f"u{index}.wav", 0.1 * torch.randn(length).numpy(), 16000)
        found.append(Utterance(f"u{index}", str(folder / f"u{index}.wav"), length, "s", "x"))
    return found


def on_grid(source, utterances):
    """Check an extraction: widths, the grid's frame counts, and that one by one it is the same; return the layers."""
    from espnet_mamba.analysis.statistics import collect_features

    together = collect_features(source, utterances)
    assert together.names == source.names and [layer.shape[1] for layer in together.layers] == source.dims
    assert together.sizes == [(length - 400) // 320 + 1 for length in LENGTHS] and source.hop == 320
    backwards = collect_features(source, utterances[::-1])
    assert all(torch.equal(a, b) for a, b in zip(together.layers, backwards.layers, strict=True))
    alone = [collect_features(source, [utterance]).layers for utterance in utterances]
    for layer, parts in zip(together.layers, zip(*alone, strict=True), strict=True):
        assert torch.equal(layer, torch.cat(parts))
    return together


@pytest.fixture(scope="module")
def upstream(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("upstream")
    save_checkpoint(HubertModel(TINY), folder)
    return folder


@pytest.mark.espnet
def test_our_upstream_through_s3prl_is_the_model_itself(utterances, upstream):
    from espnet_mamba.analysis.statistics import collect_features
    from espnet_mamba.targets.features import open_features
    from s3prl_upstream.features import open_s3prl

    before = torch.random.get_rng_state()
    found = on_grid(open_s3prl(f"s3prl:mamba_hubert:{upstream}"), utterances)
    assert torch.equal(torch.random.get_rng_state(), before)
    expected = collect_features(open_features(str(upstream)), utterances)
    assert found.names == expected.names
    for layer, other in zip(found.layers, expected.layers, strict=True):
        torch.testing.assert_close(layer, other, atol=1e-4, rtol=1e-3)


@pytest.mark.espnet
def test_filterbanks_are_taken_at_every_second_frame(utterances):
    from s3prl_upstream.features import S3prlSource, open_s3prl

    source = open_s3prl("s3prl:fbank")
    found = on_grid(source, utterances)
    assert source.names == ["fbank"] and source.rates == [160]
    own = S3prlSource("fbank", grid=None)
    wav = torch.from_numpy(soundfile.read(utterances[0].path, dtype="float32")[0])
    layers, counts = own(wav[None], torch.tensor([len(wav)]))
    assert own.hop == 160 and counts.tolist() == [-(-9000 // 160)]
    assert torch.equal(found.layers[0][: found.sizes[0]], layers[0][0, ::2][: found.sizes[0]])


@pytest.mark.espnet
def test_a_random_hubert_of_transformers_needs_no_network(utterances, tmp_path):
    from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

    from s3prl_upstream.features import open_s3prl

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = HubertConfig(**sizes, conv_dim=(8,) * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)
    HubertModel(config).save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=False).save_pretrained(tmp_path)
    source = open_s3prl(f"s3prl:hf_hubert_custom:{tmp_path}")
    found = on_grid(source, utterances)
    assert source.dims == [16] * 3
    wav = torch.from_numpy(soundfile.read(utterances[1].path, dtype="float32")[0])
    with torch.no_grad():
        states = HubertModel.from_pretrained(tmp_path).eval()(wav[None], output_hidden_states=True).hidden_states
    rows = found.utterance == 1
    for layer, state in zip(found.layers, states, strict=True):
        torch.testing.assert_close(layer[rows], state[0], atol=1e-5, rtol=1e-4)


@pytest.mark.espnet
def test_ssamba_is_repeated_to_the_grid(utterances, tmp_path):
    from espnet_mamba.models.ssamba.checkpoints import save_checkpoint as save_ssamba
    from espnet_mamba.models.ssamba.config import SsambaConfig
    from espnet_mamba.models.ssamba.model import SsambaModel
    from s3prl_upstream.features import open_s3prl

    config = SsambaConfig(embed_dim=16, depth=4, state_size=2)
    save_ssamba(SsambaModel(config), tmp_path)
    source = open_s3prl(f"s3prl:ssamba_mean:{tmp_path}")
    assert source.names == ["layer0", "layer1", "layer2"] and source.rates == [2560] * 3
    frames = on_grid(source, utterances).layers[2]
    assert torch.equal(frames[0], frames[7]) and not torch.equal(frames[7], frames[8])


@pytest.mark.espnet
def test_wrong_names_and_paths_are_named(tmp_path):
    from s3prl_upstream.features import open_s3prl

    with pytest.raises(ValueError, match="s3prl:fbnk: S3PRL has no such upstream, did you mean 'fbank'"):
        open_s3prl("s3prl:fbnk")
    with pytest.raises(ValueError, match="s3prl:mamba_hubert:/nowhere: S3PRL cannot build it .*no such folder"):
        open_s3prl("s3prl:mamba_hubert:/nowhere")


def asr_folder(folder, upstream=None, decoder=True, **encoder):
    """Write an untrained recogniser as stage 8 leaves it: config.yaml and weights."""
    from espnet_mamba.asr.preparation import merged, read_yaml
    from espnet_mamba.asr.task import ASRTask

    base = {"token_list": ["<blank>", "<unk>", "a", "b", "<sos/eos>"], "token_type": "char", "output_dir": str(folder)}
    conf = Path(__file__).resolve().parents[1] / "conf" / "asr"
    config = merged(read_yaml(conf / "train_conformer_tiny.yaml"), base)
    if upstream is None:
        config = merged(config, read_yaml(conf / "logmel.yaml"))
    else:
        config = merged(config, {"preencoder_conf": {"input_size": 16}})
        config = merged(config, {"frontend_conf": {"frontend_conf": {"path_or_url": str(upstream)}}})
    config = merged(config, {"preencoder_conf": {"output_size": 16}, "encoder_conf": {"output_size": 16}})
    config = merged(config, {"encoder_conf": {"num_blocks": 2, "attention_heads": 2, "linear_units": 16}})
    if not decoder:
        config = merged(config, {"decoder": None, "model_conf": {"ctc_weight": 1.0}})
        config.pop("decoder_conf")
    if encoder:
        config |= encoder
    folder.mkdir()
    (folder / "given.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--config", str(folder / "given.yaml")]
    args = ASRTask.get_parser().parse_args(arguments)
    args.token_list = base["token_list"]
    torch.manual_seed(0)
    model = ASRTask.build_model(args)
    (folder / "config.yaml").write_text(yaml.safe_dump(vars(args)))
    torch.save(model.state_dict(), folder / "valid.acc.ave.pth")
    return model.eval()


@pytest.mark.espnet
@pytest.mark.parametrize("kind", ["pretrained", "fbank"])
def test_layers_of_a_recogniser_are_those_of_its_blocks(kind, utterances, upstream, tmp_path):
    from espnet_mamba.asr.features import open_asr

    model = asr_folder(tmp_path / "asr", upstream if kind == "pretrained" else None)
    source = open_asr(f"asr:{tmp_path / 'asr'}")
    assert source.names == ["layer0", "layer1", "layer2"] and source.rate == 640
    found = on_grid(source, utterances)
    wav = torch.from_numpy(soundfile.read(utterances[1].path, dtype="float32")[0])[None]
    with torch.no_grad():
        encoded, lengths = model.encode(wav, torch.tensor([16000]))
        last = model.encoder.after_norm(found.layers[2][found.utterance == 1])
    torch.testing.assert_close(last[::2], encoded[0, : len(last[::2])], atol=1e-5, rtol=1e-4)
    assert int(lengths) == {"pretrained": 25, "fbank": 26}[kind]  # ESPnet's filterbank frames reach over the ends


@pytest.mark.espnet
def test_a_decoder_makes_no_difference_and_conbimamba_is_read_too(utterances, tmp_path):
    from espnet_mamba.asr.features import AsrSource

    with_decoder, without = asr_folder(tmp_path / "a"), asr_folder(tmp_path / "b", decoder=False)
    assert with_decoder.decoder is not None and without.decoder is None
    shared = {name: value for name, value in with_decoder.state_dict().items() if not name.startswith("decoder")}
    torch.save(
        without.state_dict() | {k: v for k, v in shared.items() if k in without.state_dict()}, tmp_path / "b/w.pth"
    )
    one, other = (
        on_grid(source, utterances) for source in (AsrSource(tmp_path / "a"), AsrSource(tmp_path / "b", "w.pth"))
    )
    assert all(torch.equal(a, b) for a, b in zip(one.layers, other.layers, strict=True))
    options = {"output_size": 16, "linear_units": 16, "num_blocks": 2, "input_layer": "conv2d"}
    asr_folder(tmp_path / "c", preencoder=None, encoder="conbimamba", encoder_conf=options)
    source = AsrSource(tmp_path / "c")
    assert source.rate == 640 and source.dims == [16] * 3
    on_grid(source, utterances)
    with pytest.raises(ValueError, match="of 900 samples is too short for the encoder"):
        source(torch.zeros(1, 900), torch.tensor([900]))


@pytest.mark.espnet
def test_wrong_recognisers_are_named(tmp_path):
    from espnet_mamba.asr.features import open_asr

    with pytest.raises(FileNotFoundError, match="config.yaml: no such"):
        open_asr(f"asr:{tmp_path}")
    model = asr_folder(tmp_path / "asr")
    with pytest.raises(FileNotFoundError, match="best.pth: no such model; those there: valid.acc.ave.pth"):
        open_asr(f"asr:{tmp_path / 'asr'}:best.pth")
    weights = model.state_dict()
    weights.pop("encoder.after_norm.weight")
    torch.save(weights, tmp_path / "asr/valid.acc.ave.pth")
    with pytest.raises(ValueError, match="not the weights of .*after_norm"):
        open_asr(f"asr:{tmp_path / 'asr'}")
