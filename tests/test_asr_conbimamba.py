"""Paper 1's ASR encoder, through ESPnet's own Task."""

import argparse

import pytest
import torch
import yaml

pytestmark = pytest.mark.espnet


def encoder(**options):
    from espnet_mamba.asr.conbimamba_encoder import ConBiMambaEncoder

    return ConBiMambaEncoder(**options)


def test_the_published_configuration_builds_with_its_size(root, tmp_path):
    from espnet_mamba.asr.task import ASRTask

    tokens = tmp_path / "tokens.txt"
    tokens.write_text("".join(f"t{i}\n" for i in range(5000)))
    config = yaml.safe_load((root / "conf/asr/train_conbimamba_asr.yaml").read_text())
    words = ["--config", str(root / "conf/asr/train_conbimamba_asr.yaml"), "--token_list", str(tokens)]
    args = ASRTask.get_parser().parse_args([*words, "--output_dir", str(tmp_path), "--token_type", "char"])
    args.token_list = tokens.read_text().split()
    assert isinstance(args, argparse.Namespace) and args.encoder == "conbimamba"
    with torch.device("meta"):
        model = ASRTask.build_model(args)
    count = lambda module: sum(p.numel() for p in module.parameters()) / 1e6  # noqa: E731
    blocks = count(model.encoder.encoders)
    assert blocks / 12 == pytest.approx(8.92, abs=0.01)  # computed, docs/papers.md 4
    assert count(model.encoder) == pytest.approx(114.4, abs=0.1) and count(model) == pytest.approx(147.4, abs=0.1)
    assert config["encoder_conf"]["num_blocks"] == len(model.encoder.encoders)


@pytest.mark.parametrize("input_layer", ["conv2d", None])
def test_padding_and_batch_mates_change_nothing(input_layer):
    width = 20 if input_layer else 16
    model = encoder(
        input_size=width, output_size=16, linear_units=32, num_blocks=2, input_layer=input_layer, cnn_module_kernel=5
    ).eval()
    x, lengths = torch.randn(3, 60, width), torch.tensor([60, 33, 12])
    y, out_lengths, _ = model(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone, alone_length, _ = model(x[row : row + 1, :length], lengths[row : row + 1])
        frames = int(out_lengths[row])
        assert frames == int(alone_length)
        torch.testing.assert_close(y[row, :frames], alone[0], rtol=1e-4, atol=1e-5)


def test_bad_options_and_short_input_are_named():
    with pytest.raises(ValueError, match="'rel_pos' is not one of: abs_pos none"):
        encoder(input_size=80, pos_enc_layer_type="rel_pos")
    with pytest.raises(ValueError, match="takes features of width 512, given 80"):
        encoder(input_size=80, input_layer=None)
    from espnet.nets.pytorch_backend.transformer.subsampling import TooShortUttError

    model = encoder(input_size=20, output_size=16, linear_units=32, num_blocks=1, pos_enc_layer_type="none")
    with pytest.raises(TooShortUttError, match="has 5 frames, needs at least 7"):
        model(torch.randn(1, 5, 20), torch.tensor([5]))
