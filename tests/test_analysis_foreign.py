"""The analysis stage on models that are not ours: S3PRL's with and without convolutions, recognisers of both kinds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_analysis_stage import write_set
from test_downstream_features import asr_folder
from test_downstream_upstream import TINY

from espnet_mamba.analysis.settings import AnalysisSettings
from espnet_mamba.analysis.stage import run_analysis
from espnet_mamba.analysis.statistics import collect_features, split_layer
from espnet_mamba.analysis.table import read_table_csv
from espnet_mamba.bin.analyse import open_source
from espnet_mamba.data.manifest import read_manifest
from espnet_mamba.models.checkpoints import save_checkpoint
from espnet_mamba.models.hubert import HubertModel
from espnet_mamba.targets.features import add_conv

pytestmark = pytest.mark.espnet


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("foreign")
    for seed, name in enumerate(("dev", "test")):
        write_set(root / "dump" / name, 8, seed)
    torch.manual_seed(0)
    save_checkpoint(HubertModel(TINY), root / "ours")
    return root


def test_convolutions_of_upstreams_come_out_of_the_same_pass(place, tmp_path):
    from transformers import HubertConfig, Wav2Vec2FeatureExtractor
    from transformers import HubertModel as HfHubert

    utterances = read_manifest(place / "dump/test")
    ours, through = open_source(str(place / "ours")), open_source(f"s3prl:mamba_hubert:{place / 'ours'}")
    assert add_conv(ours) and add_conv(through) and through.dims == ours.dims
    expected, found = (split_layer(collect_features(source, utterances), "conv")[1] for source in (ours, through))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = HubertConfig(**sizes, conv_dim=(8,) * 7, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)
    hf = HfHubert(config).eval()
    hf.save_pretrained(tmp_path)
    Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=False).save_pretrained(tmp_path)
    source = open_source(f"s3prl:hf_hubert_custom:{tmp_path}")
    assert add_conv(source) and source.names[-1] == "conv" and source.dims == [16, 16, 16, 8]
    wav = 0.1 * torch.randn(1, 16000)
    layers, counts = source(wav, torch.tensor([16000]))
    with torch.no_grad():
        torch.testing.assert_close(layers[-1][0], hf.feature_extractor(wav)[0].T[: int(counts)], atol=1e-5, rtol=1e-4)
    assert not add_conv(open_source("s3prl:fbank"))


def test_recognisers_with_and_without_decoder_are_measured_alike(place, tmp_path, capsys):
    asr_folder(tmp_path / "both"), asr_folder(tmp_path / "ctc", decoder=False)
    systems = {name: f"asr:{tmp_path / name}" for name in ("both", "ctc")} | {"fbank": "s3prl:fbank"}
    quick = AnalysisSettings(information=("ksg",), per_utterance_utterances=0, measures=("probes",))
    quick = replace(quick, purity=replace(quick.purity, clusters=(4,), iterations=5, resamples=20))
    run_analysis(quick, place / "dump", ("dev", "test"), systems, tmp_path / "out", open_source=open_source)
    rows = read_table_csv(tmp_path / "out/mutual_information.csv")
    measured = {(row.system, row.reference, row.layer) for row in rows}
    own = [("layer0", 1), ("layer0", 2), ("logmel", 0), ("logmel", 1), ("logmel", 2)]
    assert measured == {(name, *where) for name in ("both", "ctc") for where in own}
    assert "both: mutual information with conv is left out" in capsys.readouterr().out
    purity = read_table_csv(tmp_path / "out/purity.csv")
    assert {row.system for row in purity} == {"both", "ctc", "fbank"}
