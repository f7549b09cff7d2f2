"""Stages 1 to 3 of the LibriSpeech recipes through their run.sh, on an unpacked copy of a few seconds."""

import json
import os
import subprocess

import soundfile
from librispeech_tree import make_tree, write_chapter

from espnet_mamba.data.kaldi import read_table
from espnet_mamba.targets.labels import FrameLabels


def recipe(root, name, tmp_path, tree, *options):
    """Run a recipe's first three stages with all of its folders under ``tmp_path``."""
    settings = {
        "corpus_dir": tree,
        "datadir": tmp_path / "data",
        "dumpdir": tmp_path / "dump",
        "expdir": tmp_path / "exp",
    }
    settings |= {"stop_stage": "targets1", "ngpu": 0, "nj": 1, "num_clusters1": 4, "kmeans_frames": 2000}
    words = [str(word) for pair in settings.items() for word in (f"--{pair[0]}", pair[1])]
    env = os.environ | {"ESPNET_MAMBA_NO_SETUP": "1", "OMP_NUM_THREADS": "1"}
    command = [str(root / f"egs2/{name}/ssl1/run.sh"), *words, *options]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)


def test_the_mini_recipe_from_tree_to_labels(root, tmp_path):
    tree = make_tree(tmp_path)
    result = recipe(root, "mini_librispeech", tmp_path, "LibriSpeech")  # meant from where the user stands
    assert result.returncode == 0, result.stderr + result.stdout
    labels = FrameLabels(tmp_path / "exp/targets_mini_librispeech_it1/train.npy")  # named by the recipe, not the folder
    assert len(labels["103-1240-0001"]) == (8000 - 400) // 160 + 1
    assert (tmp_path / "exp/extbimamba_small_mini_librispeech/stages/03_targets1.json").is_file()
    more = ["--stop_stage", "check", "--variant", "layer9", "--data_args", "--speaker chapter"]
    result = recipe(root, "mini_librispeech", tmp_path, tree, *more)
    assert result.returncode == 0, result.stderr
    assert "103-1240" in read_table(tmp_path / "dump/raw/train/utt2spk").values()
    assert (tmp_path / "exp/extbimamba_small_mini_librispeech_layer9/stages/02_check.json").is_file()


def test_a_missing_part_stops_the_960_hour_recipe_at_stage_1(root, tmp_path):
    result = recipe(root, "librispeech", tmp_path, make_tree(tmp_path), "--stop_stage", "data")
    assert result.returncode != 0 and "stage 1 (data) failed" in result.stderr
    assert (
        "no part train-clean-100, train-clean-360, train-other-500, dev-clean, dev-other"
        in result.stdout + result.stderr
    )


def test_recorded_speech_in_librispeechs_layout(root, tmp_path, so762):
    readers = {"train-clean-100": 3, "dev-clean": 1, "test-clean": 1}
    tree = tmp_path / "LibriSpeech"
    for (part, count), name in zip(readers.items(), ("train", "dev", "test"), strict=True):
        wavs, texts, speakers = (read_table(so762 / name / table) for table in ("wav.scp", "text", "utt2spk"))
        for reader in sorted(set(speakers.values()))[:count]:
            ids = [utt_id for utt_id, speaker in speakers.items() if speaker == reader][:4]
            recordings = [(soundfile.read(so762 / wavs[utt_id])[0], texts[utt_id]) for utt_id in ids]
            write_chapter(tree / part, reader.lstrip("s"), "7", recordings)
    result = recipe(root, "librispeech_100", tmp_path, tree)
    assert result.returncode == 0, result.stderr + result.stdout
    assert "train: 12 recordings, 3 speakers" in result.stdout
    raw = tmp_path / "dump/raw/train"
    assert len(read_table(raw / "text")) == 12 and len(set(read_table(raw / "utt2spk").values())) == 3
    quality = json.loads((tmp_path / "exp/targets_librispeech_100_it1/quality.json").read_text())
    assert quality["num_clusters"] == 4 and quality["rate_hz"] == 100
