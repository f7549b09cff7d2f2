"""What the downstream stages read: S3PRL's csv lists, ESPnet's configurations, and refusals that name the cause."""

from __future__ import annotations

import csv

import pytest
import yaml

from espnet_mamba.asr import training
from espnet_mamba.asr.preparation import merged, read_set, read_yaml, system_config
from espnet_mamba.asr.systems import System
from espnet_mamba.bin.asr_train import parse_options
from espnet_mamba.data.files import write_json
from espnet_mamba.data.kaldi import write_table
from s3prl_upstream.superb_data import choose_task, write_lists
from s3prl_upstream.superb_run import exact_counts, slot_counts


def make_dump(folder, per_speaker, intents=None, text="PLAY MUSIC"):
    """Write checked sets in which each speaker has ``per_speaker`` utterances."""
    for name in ("train", "dev", "test"):
        utts = [f"{speaker}-{name}{i:02d}" for speaker in ("ann", "bob") for i in range(per_speaker)]
        write_table(folder / name / "wav.scp", {utt: f"/audio/{utt}.wav" for utt in utts})
        write_table(folder / name / "utt2spk", {utt: utt.split("-")[0] for utt in utts})
        write_table(folder / name / "utt2num_samples", dict.fromkeys(utts, "16000"))
        write_table(folder / name / "text", dict.fromkeys(utts, text))
        if intents:
            write_table(folder / name / "utt2intent", dict.fromkeys(utts, intents))
    return folder


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_intents_become_labels_of_the_sets_as_they_are(tmp_path):
    dump = make_dump(tmp_path / "raw", 2, "play music none two")
    assert choose_task("auto", dump) == "ic"
    assert write_lists("ic", dump, tmp_path / "lists") == {"train": 4, "valid": 4, "test": 4}
    row = read_csv(tmp_path / "lists" / "valid.csv")[0]
    assert row == {"id": "ann-dev00", "wav_path": "/audio/ann-dev00.wav", "labels": "play ; music ; none ; two"}


def test_speakers_are_split_by_utterance_and_known_in_every_part(tmp_path):
    dump = make_dump(tmp_path / "raw", 20)
    assert choose_task("auto", dump) == "sid"
    assert write_lists("sid", dump, tmp_path / "lists") == {"train": 28, "valid": 6, "test": 6}
    parts = [read_csv(tmp_path / "lists" / f"{split}.csv") for split in ("train", "valid", "test")]
    ids = [row["id"] for part in parts for row in part]
    assert len(ids) == len(set(ids)) == 40 and all("-train" in utt for utt in ids)
    assert all({row["label"] for row in part} == {"ann", "bob"} for part in parts)


def test_superb_refusals(tmp_path):
    with pytest.raises(ValueError, match="--task asv: one of auto, ks, ic, sid"):
        choose_task("asv", tmp_path)
    dump = make_dump(tmp_path / "raw", 2)
    with pytest.raises(ValueError, match="0 speakers with three utterances or more"):
        write_lists("sid", dump, tmp_path / "lists")
    with pytest.raises(ValueError, match="utt2intent: no such file"):
        write_lists("ic", dump, tmp_path / "lists")
    table = dict.fromkeys(["ann-train00", "bob-train00", "bob-train01"], "a b")
    write_table(dump / "train" / "utt2intent", table | {"ann-train01": "a"})
    with pytest.raises(ValueError, match="ann-train01 has 1 slots, others have 2"):
        write_lists("ic", dump, tmp_path / "lists")


def test_sets_without_transcripts_are_refused_and_empty_ones_left_out(tmp_path, capsys):
    dump = make_dump(tmp_path / "raw", 2)
    write_table(dump / "dev" / "text", {"ann-dev00": "PLAY", "ann-dev01": "", "bob-dev00": "STOP", "bob-dev01": "GO"})
    assert len(read_set(dump, "dev")) == 3
    assert "dev: 1 of 4 utterances have no transcript" in capsys.readouterr().out
    (dump / "dev" / "text").unlink()
    with pytest.raises(ValueError, match="text: no such file; speech recognition needs transcripts"):
        read_set(dump, "dev")
    write_table(dump / "test" / "text", dict.fromkeys(["ann-test00", "ann-test01", "bob-test00", "bob-test01"], ""))
    with pytest.raises(ValueError, match="no utterance with a transcript"):
        read_set(dump, "test")
    with pytest.raises(FileNotFoundError, match="made by stage 2"):
        read_set(dump, "nowhere")


def test_filterbanks_differ_from_upstreams_in_features_only(root, tmp_path):
    (tmp_path / "config.json").write_text('{"format": "espnet-mamba HubertModel", "embed_dim": 128}')
    base = root / "conf" / "asr" / "train_conformer_tiny.yaml"
    upstream = system_config(base, System("pretrained", tmp_path), tmp_path, {"max_epoch": 3})
    fbank = system_config(base, System("fbank", None), tmp_path, {"max_epoch": 3})
    differing = {key for key in upstream if upstream[key] != fbank[key]}
    assert differing == {"frontend", "frontend_conf", "freeze_param", "preencoder_conf", "output_dir"}
    assert "frontend_conf" not in fbank["frontend_conf"]  # nothing of the other front end is left
    assert upstream["preencoder_conf"]["input_size"] == 128 and upstream["max_epoch"] == 3
    assert upstream["frontend_conf"]["frontend_conf"]["path_or_url"] == str(tmp_path)
    frames = [upstream["preencoder_conf"]["stack"] * 320, fbank["preencoder_conf"]["stack"] * 160]
    assert frames[0] == frames[1]  # both encoders see the same frame rate


def test_options_of_the_command_line_reach_into_dictionaries():
    options = parse_options(["--max_epoch", "3", "--optim_conf={lr: 0.5}", "--num_workers=0"])
    assert options == {"max_epoch": 3, "optim_conf": {"lr": 0.5}, "num_workers": 0}
    assert merged({"optim_conf": {"lr": 1, "eps": 2}}, options)["optim_conf"] == {"lr": 0.5, "eps": 2}
    with pytest.raises(ValueError, match="write each further option as --name value"):
        parse_options(["--max_epoch"])


def test_configurations_are_read_and_broken_ones_named(root, tmp_path):
    for path in [*(root / "conf" / "asr").glob("*.yaml"), *(root / "conf" / "superb").glob("*.yaml")]:
        assert read_yaml(path)
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ValueError, match="broken.yaml: not valid YAML"):
        read_yaml(broken)
    broken.write_text(yaml.safe_dump(["a"]))
    with pytest.raises(ValueError, match="expected lines of"):
        read_yaml(broken)


def test_slots_and_whole_intents_are_counted_by_hand():
    predictions = {
        "b": {"prediction": ["play", "none"], "label": ["play", "none"]},
        "a": {"prediction": ["play", "two"], "label": ["stop", "two"]},
    }
    assert [counts.tolist() for counts in slot_counts(predictions)] == [[1, 2], [2, 2]]
    assert exact_counts(predictions)[0].tolist() == [0, 1]
    assert exact_counts({"a": {"prediction": "ann", "label": "anna"}})[0].tolist() == [0]


def test_a_training_goes_on_for_more_epochs_and_starts_again_when_an_input_changed(tmp_path, capsys):
    folder = tmp_path / "fbank"
    inputs = {"options": {"max_epoch": 2, "seed": 0}, "files": {"tokens": "a1"}}
    training.prepare_folder(folder, inputs)
    assert not training.is_done(folder, inputs)
    write_json(folder / "done.json", {"max_epoch": 2})
    assert training.is_done(folder, inputs)
    more = {"options": {"max_epoch": 5, "seed": 0}, "files": {"tokens": "a1"}}
    assert not training.is_done(folder, more)
    training.prepare_folder(folder, more)
    assert (folder / "done.json").is_file() and not capsys.readouterr().out
    other = {"options": {"max_epoch": 5, "seed": 1}, "files": {"tokens": "b2"}}
    assert not training.is_done(folder, other)
    training.prepare_folder(folder, other)
    assert "asr fbank: seed, tokens changed: training starts again" in capsys.readouterr().out
    assert not (folder / "done.json").exists()
