"""ESPnet and S3PRL themselves on a few tones: one short training each, decoded and scored, the upstream unmoved."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile
import torch
from test_downstream_upstream import TINY

from espnet_mamba.asr.systems import System
from espnet_mamba.data.kaldi import Segment, write_ctm, write_table
from espnet_mamba.models.checkpoints import save_checkpoint
from espnet_mamba.models.hubert import HubertModel

pytestmark = pytest.mark.espnet
WORDS = ("LOW", "HIGH")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Write sets of tones, two words told apart by pitch, and an upstream with random weights."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = np.random.default_rng(0)
    for name, count in (("train", 12), ("dev", 4), ("test", 4)):
        tables = {table: {} for table in ("wav.scp", "text", "utt2spk", "utt2num_samples", "utt2intent")}
        for i in range(count):
            utt, word, samples = f"{name}{i:02d}", WORDS[i % 2], 8000 + 400 * i
            tone = 0.3 * np.sin(2 * np.pi * (200, 1500)[i % 2] * np.arange(samples) / 16000)
            path = folder / "wav" / f"{utt}.wav"
            path.parent.mkdir(exist_ok=True)
            soundfile.write(path, tone + 0.01 * generator.standard_normal(samples), 16000)
            values = (str(path), f"{word} TONE", f"s{i % 2}", str(samples), f"{word.lower()} tone")
            for table, value in zip(tables, values, strict=True):
                tables[table][utt] = value
        for table, rows in tables.items():
            write_table(folder / "raw" / name / table, rows)
        words = {utt: [Segment(0.1, 0.3, f"{text.split()[0]}TONE")] for utt, text in tables["text"].items()}
        write_ctm(folder / "raw" / name / "words.ctm", words)
    torch.manual_seed(0)
    save_checkpoint(HubertModel(TINY), folder / "upstream")
    return folder


@pytest.fixture(scope="module")
def trained(corpus, root_folder):
    """Train the system ``random`` for an epoch in a process of its own."""
    from espnet_mamba.asr.training import train_systems

    out_dir = corpus / "asr"
    small = {"encoder_conf": {"output_size": 16, "num_blocks": 1}, "preencoder_conf": {"output_size": 16}}
    small |= {"max_epoch": 1}
    system = System("random", corpus / "upstream")
    config = root_folder / "conf" / "asr" / "train_conformer_tiny.yaml"

    def train(**options):
        train_systems(config, corpus / "raw", "train", "dev", out_dir, [system], 20, small | options, 1)

    train()
    return out_dir, train


@pytest.fixture(scope="module")
def root_folder():
    from pathlib import Path

    return Path(__file__).resolve().parents[1]


def test_training_leaves_the_upstream_as_it_was(trained, corpus):
    from safetensors.torch import load_file

    from espnet_mamba.asr.task import ASRTask

    out_dir, _ = trained
    state = torch.load(out_dir / "random" / "checkpoint.pth", weights_only=False)["model"]
    prefix = "frontend.upstream.upstream.upstream.model."
    weights = load_file(corpus / "upstream" / "model.safetensors")
    assert all(torch.equal(state[prefix + name], value) for name, value in weights.items())
    assert state["frontend.featurizer.weights"].abs().max() > 0  # while the weighted sum did learn
    model, _ = ASRTask.build_model_from_file(str(out_dir / "random" / "config.yaml"), None)
    model.train()
    assert not any(module.training for module in model.frontend.upstream.modules())
    speech, lengths = torch.randn(2, 8000), torch.tensor([8000, 6000])
    first, _ = model.frontend(speech, lengths)
    model.frontend.upstream.clear()
    assert torch.equal(first, model.frontend(speech, lengths)[0])  # no dropout, no mask: the same again


def test_a_finished_training_is_left_alone_and_a_broken_one_starts_again(trained, capsys):
    out_dir, train = trained
    written = (out_dir / "random" / "checkpoint.pth").stat().st_mtime_ns
    train()
    assert "asr random: already trained" in capsys.readouterr().out
    assert (out_dir / "random" / "checkpoint.pth").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="max_epochs: not an option of ESPnet's ASR task"):
        train(max_epochs=3)
    assert (out_dir / "random" / "checkpoint.pth").is_file()  # a mistyped option destroys nothing
    (out_dir / "random" / "done.json").unlink()
    (out_dir / "random" / "checkpoint.pth").write_bytes(b"PK\x03\x04 cut off")
    train()
    assert "cut off while it was written" in capsys.readouterr().out
    assert (out_dir / "random" / "done.json").is_file()


def test_decoding_scores_every_utterance(trained, corpus, root_folder):
    from espnet_mamba.asr.decoding import decode_systems

    out_dir, train = trained
    train()
    config = root_folder / "conf" / "asr" / "decode.yaml"
    (corpus / "wav" / "test03.wav").rename(corpus / "wav" / "moved.wav")
    try:
        table = decode_systems(config, corpus / "raw", "test", out_dir, [], {"beam_size": 2}, 1)
    finally:
        (corpus / "wav" / "moved.wav").rename(corpus / "wav" / "test03.wav")
    score = json.loads((out_dir / "random" / "score.json").read_text())
    assert (score["num_utts"], score["num_words"], score["num_failed"]) == (4, 8, 1)
    assert score["wer_low"] <= score["wer"] <= score["wer_high"]
    assert "test03 failed and counts as empty" in table
    with pytest.raises(ValueError, match="no such model; the models there are"):
        decode_systems(config, corpus / "raw", "test", out_dir, [], {"asr_model_file": "best.pth"}, 1)
    tokens = out_dir / "tokens" / "tokens.txt"
    kept = tokens.read_text()
    tokens.write_text(kept.replace("<unk>", "<oov>"))
    with pytest.raises(ValueError, match="not the tokens that .* was trained with"):
        decode_systems(config, corpus / "raw", "test", out_dir, [], {}, 1)
    tokens.write_text(kept)


def test_the_plain_s3prl_front_end_finds_the_upstream_and_it_stays_in_evaluation(corpus):
    from espnet2.asr.frontend.s3prl import S3prlFrontend

    import espnet_mamba.asr.task  # noqa: F401 - registers

    conf = {"upstream": "mamba_hubert", "path_or_url": str(corpus / "upstream")}
    frontend = S3prlFrontend(frontend_conf=conf, multilayer_feature=True)
    frontend.train()
    assert not frontend.upstream.upstream.training
    features, lengths = frontend(torch.randn(2, 8000), torch.tensor([8000, 3200]))
    assert features.shape == (2, 25, 16) and lengths.tolist() == [25, 10]


def test_stacked_linear_does_not_read_padding():
    from espnet_mamba.asr.preencoder import StackedLinear

    layer = StackedLinear(3, 5, stack=2)
    x = torch.randn(2, 7, 3)
    lengths = torch.tensor([7, 3])
    y, frames = layer(x, lengths)
    x[1, 3:] = float("nan")
    assert frames.tolist() == [4, 2] and y.shape == (2, 4, 5)
    torch.testing.assert_close(layer(x, lengths)[0], y)


@pytest.mark.parametrize("task", ["auto", "ic"])
def test_superb_head_runs_is_repeated_by_nothing_and_compares(task, corpus, root_folder, capsys):
    from s3prl_upstream.superb_run import run_systems

    systems = [System("random", corpus / "upstream"), System("fbank", None)]
    options = {"train": {"total_steps": 4, "eval_step": 2, "save_step": 4, "log_step": 2}}
    config = root_folder / "conf" / "superb" / "tiny.yaml"
    out_dir = corpus / f"superb_{task}"

    def run():
        return run_systems(config, task, corpus / "raw", out_dir, systems, options, 2)

    table = run()
    result = json.loads((out_dir / "fbank" / "result.json").read_text())
    found = {"auto": "ks", "ic": "ic"}[task]
    assert (result["task"], result["metric"], result["num_utts"]) == (found, "accuracy", 4)
    assert 0 <= result["low"] <= result["value"] <= result["high"] <= 1
    assert ("slot_accuracy" in result) == (found == "ic")
    comparison = json.loads((out_dir / "comparison.json").read_text())
    assert comparison["against"] == "random" and set(comparison["differences"]) == {"fbank"}
    assert set(comparison["differences_to_fbank"]) == {"random"}
    capsys.readouterr()
    assert run() == table
    assert capsys.readouterr().out.count("already done") == 2


def test_keyword_spotting_hands_over_the_segment_only_and_quieter(tmp_path):
    import pickle

    from s3prl.dataio.encoder.category import CategoryEncoder

    from s3prl_upstream.frozen import FrozenUpstream
    from s3prl_upstream.superb import SuperbKS

    wave = np.linspace(-0.5, 0.5, 16000, dtype=np.float32)
    soundfile.write(tmp_path / "ramp.wav", wave, 16000, subtype="FLOAT")
    path = tmp_path / "ramp.wav"
    rows = ["id,wav_path,label,start_sec,end_sec", f"u#0,{path},OPEN,0.2500,0.5000", f"u#1,{path},DOOR,0.5000,0.8125"]
    (tmp_path / "test.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "encoder.pkl").write_bytes(pickle.dumps(CategoryEncoder(["OPEN", "DOOR"])))
    names = {"target_dir": "", "cache_dir": "", "mode": "test", "data_csv": tmp_path / "test.csv"}
    problem = SuperbKS()
    dataset = problem.build_dataset({}, **names, encoder_path=tmp_path / "encoder.pkl", frame_shift=320)
    for item, (start, end) in zip(dataset, ((4000, 8000), (8000, 13000)), strict=True):
        expected = torch.from_numpy(wave[start:end]) * 10 ** (-3 / 20)
        torch.testing.assert_close(item["x"].view(-1), expected, atol=1e-6, rtol=0)
    upstream = FrozenUpstream(problem.build_upstream({"name": "fbank", "cache_mb": 1.0}).upstream)
    wavs = [item["x"].view(1, -1) for item in dataset]
    first, second = (upstream(wav, torch.tensor([wav.size(1)]))[0][0] for wav in wavs)
    assert len(upstream.cache) == 2 and first.size(1) < second.size(1)  # one recording, two entries
    sampler = problem.build_batch_sampler({"valid": {"batch_size": 1}}, "", "", "valid", names["data_csv"], dataset)
    assert sorted(index for batch in sampler for index in batch) == [0, 1]  # each example once


def test_check_passes_for_a_good_folder_and_catches_a_model_that_reads_padding(corpus, monkeypatch):
    from s3prl_upstream import check

    paths = [corpus / "wav" / f"train{i:02d}.wav" for i in (0, 5)]
    found = check.check_upstream(corpus / "upstream", paths)
    assert (found["num_layers"], found["width"], found["rate"]) == (3, 16, 320)
    assert found["largest_difference"] < 1e-4
    monkeypatch.setattr(check, "_distance", lambda reference, found: float("nan"))
    with pytest.raises(ValueError, match="layer 0 of .*train00.wav differs"):
        check.check_upstream(corpus / "upstream", paths)
