"""Bringing a corpus of one's own: import, the commands, and a new recipe made by one command."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from espnet_mamba.data.import_folder import import_folder
from espnet_mamba.data.kaldi import read_ctm, read_table

ROOT = Path(__file__).resolve().parents[1]
SETS = ("train", "dev", "test")
SO762 = ROOT.parent / "shared" / "data" / "so762_mini"
TEXT_AND_WORDS = ((read_table, "text"), (read_ctm, "words.ctm"))


@pytest.fixture
def corpus(tmp_path):
    """A Kaldi-style folder: train's paths are relative to it, dev's to the set, test's absolute."""
    folder = tmp_path / "my corpus"
    for name in SETS:
        (folder / name / "audio").mkdir(parents=True)
        wav = folder / name / "audio" / "a b.wav"
        soundfile.write(wav, 0.1 * np.sin(np.arange(16000) / 5), 16000)
        path = {"train": "train/audio/a b.wav", "dev": "audio/a b.wav", "test": str(wav)}[name]
        (folder / name / "wav.scp").write_text(f"{name}-1 {path}\n")
        (folder / name / "text").write_text(f"{name}-1 HELLO\n")
        (folder / name / "utt2spk").write_text(f"{name}-1 {name}\n")
    return folder


def run(*command, **options):
    """Run a command with this interpreter as ``python`` and the checkout importable."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env["ESPNET_MAMBA_NO_SETUP"] = "1"  # whatever is run here installs nothing
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env, **options)


def check(data_dir, *options):
    module = ("-m", "espnet_mamba.bin.check_data")
    return run(sys.executable, *module, "--data_dir", data_dir, "--dump_dir", data_dir.parent / "dump", *options)


def test_import_resolves_paths_and_stage_2_accepts_it(corpus, tmp_path):
    import_folder(corpus, tmp_path / "data", SETS)
    for name in SETS:
        wav = read_table(tmp_path / "data" / name / "wav.scp")[f"{name}-1"]
        assert wav == str((corpus / name / "audio" / "a b.wav").resolve())
        assert sorted(path.name for path in (tmp_path / "data" / name).iterdir()) == ["text", "utt2spk", "wav.scp"]
    result = check(tmp_path / "data")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "dump" / "test" / "utt2num_samples").read_text() == "test-1 16000\n"


def test_words_are_imported_checked_and_carried_to_the_dump(corpus, tmp_path, capsys):
    for name in SETS:
        (corpus / name / "words.ctm").write_text(f"{name}-1 1 0.2500 0.5000 HELLO\n")
    import_folder(corpus, tmp_path / "data", SETS)
    assert "train: 1 recordings, 1 speakers words.ctm" in capsys.readouterr().out
    assert check(tmp_path / "data").returncode == 0
    assert (tmp_path / "dump" / "dev" / "words.ctm").read_text() == "dev-1 1 0.2500 0.5000 HELLO\n"
    import_folder(corpus, tmp_path / "data", SETS)  # words.ctm there is the package's own, no foreign file


def test_the_corpus_folder_comes_before_the_set_folder(corpus, tmp_path):
    (corpus / "audio").mkdir()
    shutil.copy(corpus / "dev" / "audio" / "a b.wav", corpus / "audio")
    import_folder(corpus, tmp_path / "data", SETS)
    assert read_table(tmp_path / "data" / "dev" / "wav.scp")["dev-1"] == str((corpus / "audio" / "a b.wav").resolve())


def test_import_reports_all_problems_and_writes_nothing(corpus, tmp_path, capsys):
    (corpus / "train" / "wav.scp").write_text("train-1 sox a.mp3 -t wav - |\n")
    (corpus / "dev" / "text").write_text("dev-1 A\ndev-1 B\n")
    (corpus / "test" / "utt2spk").unlink()
    with pytest.raises(ValueError, match="3 problems"):
        import_folder(corpus, tmp_path / "data", SETS)
    report = capsys.readouterr().err
    assert "train-1: 'sox a.mp3 -t wav - |' is a pipe" in report and "run the command once" in report
    assert "duplicate id 'dev-1'" in report and "test/utt2spk: no such table" in report
    assert not (tmp_path / "data").exists()


def test_import_does_not_replace_a_users_files(corpus, tmp_path):
    with pytest.raises(ValueError, match="holds 'audio', which would be lost"):
        import_folder(corpus, corpus, SETS)
    assert (corpus / "train" / "audio" / "a b.wav").exists()


def test_a_missing_corpus_is_one_line_and_status_2(tmp_path):
    result = run(sys.executable, "-m", "espnet_mamba.bin.import_corpus", "--corpus_dir", tmp_path / "no", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: corpus_dir") and result.stderr.count("\n") == 1


def test_check_command_refuses_with_status_2_and_skips_on_demand(corpus, tmp_path):
    with open(corpus / "train" / "text", "a") as handle:
        handle.write("ghost BOO\n")
    import_folder(corpus, tmp_path / "data", SETS)
    result = check(tmp_path / "data")
    assert result.returncode == 2 and "error: 1 bad items" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "dump").exists()
    assert check(tmp_path / "data", "--bad_audio", "skip").returncode == 0
    assert "ghost\tno_audio" in (tmp_path / "dump" / "train" / "rejected.tsv").read_text()


@pytest.mark.parametrize("command", ["synth_corpus", "check_data", "import_corpus"])
def test_help_imports_nothing_heavy(command):
    code = (
        f"import sys; sys.argv = ['x', '--help']; import espnet_mamba.bin.{command} as c\n"
        "try: c.main()\nexcept SystemExit: print('numpy' in sys.modules or 'soundfile' in sys.modules)"
    )
    assert run(sys.executable, "-c", code).stdout.splitlines()[-1] == "False"


def test_mini_data_script_imports_and_refuses_unknown_options(corpus, tmp_path):
    script = ROOT / "egs2" / "mini" / "ssl1" / "local" / "data.sh"
    # Relative to the folder it is called from, as the recipe calls it.
    result = run(script, "--data_dir", "data", "--corpus_dir", "my corpus", "--nj", 1, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "data" / "test" / "wav.scp").exists()
    result = run(script, "--minuets", 3, cwd=tmp_path)
    assert result.returncode == 2 and "unknown option --minuets" in result.stderr


def test_mini_data_script_speaks(tmp_path):
    pytest.importorskip("espeakng_loader", reason="needs the extra [mini]")
    script = ROOT / "egs2" / "mini" / "ssl1" / "local" / "data.sh"
    result = run(script, "--data_dir", "data", "--minutes", 0.5, "--seed", 1, "--nj", 1, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert check(tmp_path / "data").returncode == 0


@pytest.mark.skipif(not SO762.is_dir(), reason="no recorded corpus beside this checkout")
def test_recorded_corpus_goes_through_stages_1_and_2(tmp_path):
    import_folder(SO762, tmp_path / "data", SETS)
    result = check(tmp_path / "data")
    assert result.returncode == 0, result.stderr
    assert "train: 600 utterances" in result.stdout and "30 speakers" in result.stdout
    texts, words = (reader(tmp_path / "dump" / "train" / name) for reader, name in TEXT_AND_WORDS)
    assert {utt_id: " ".join(segment.label for segment in rows) for utt_id, rows in words.items()} == texts


@pytest.fixture
def checkout(tmp_path):
    """What utils/new_recipe.sh needs of a checkout, with a run.sh of our own."""
    root = tmp_path / "a checkout"
    model = root / "egs2" / "mini" / "ssl1"
    (model / "conf").mkdir(parents=True)
    (model / "data").mkdir()
    (model / "conf" / "x.yaml").touch()
    (model / "path.sh").symlink_to("../../TEMPLATE/ssl1/path.sh")
    (model / "run.sh").write_text("#!/usr/bin/env bash\n# Mini.\n    --corpus mini\n    --note 'a mini one'\n")
    shutil.copytree(ROOT / "utils" / "recipe_skeleton", root / "utils" / "recipe_skeleton")
    shutil.copy(ROOT / "utils" / "new_recipe.sh", root / "utils")
    return root


def test_new_recipe_copies_settings_and_names_the_corpus(checkout, tmp_path):
    result = run(checkout / "utils" / "new_recipe.sh", "my_corpus", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "egs2/my_corpus/ssl1/run.sh --stage data --stop_stage check" in result.stdout
    new = checkout / "egs2" / "my_corpus" / "ssl1"
    assert sorted(path.name for path in new.iterdir()) == ["conf", "local", "path.sh", "run.sh"]
    lines = (new / "run.sh").read_text().splitlines()
    assert lines[1].startswith("# my_corpus: made by")
    assert lines[2:] == ["    --corpus my_corpus", "    --note 'a mini one'"]
    assert os.access(new / "run.sh", os.X_OK) and os.access(new / "local" / "data.sh", os.X_OK)
    assert os.readlink(new / "path.sh") == "../../TEMPLATE/ssl1/path.sh"
    assert sorted(path.name for path in (checkout / "egs2").iterdir()) == ["mini", "my_corpus"]


def test_new_recipe_says_what_to_write_until_edited_and_imports_a_folder(checkout, corpus, tmp_path):
    run(checkout / "utils" / "new_recipe.sh", "mine")
    recipe = checkout / "egs2" / "mine" / "ssl1"
    result = run("local/data.sh", "--data_dir", "data", cwd=recipe)
    assert result.returncode == 2 and "edit it" in result.stderr and "--corpus_dir" in result.stderr
    text = run("local/data.sh", "--help", cwd=recipe).stdout
    assert all(word in text for word in ("wav.scp", "text", "utt2spk", "16 kHz, mono"))
    assert all(word in text for word in ("phones.ctm", "words.ctm", "utt2intent"))
    result = run("local/data.sh", "--data_dir", "data", "--corpus_dir", corpus, "--minutes", 2, cwd=recipe)
    assert result.returncode == 0, result.stderr
    assert check(recipe / "data").returncode == 0


@pytest.mark.parametrize("name", ["a/b", "a b", "", ".hidden", "-x", "mini"])
def test_new_recipe_refuses_bad_and_taken_names(checkout, name):
    result = run(checkout / "utils" / "new_recipe.sh", name)
    assert result.returncode == 2 and result.stderr.startswith("error: ")
    assert [path.name for path in (checkout / "egs2").iterdir()] == ["mini"]


def test_new_recipe_help_and_missing_name(checkout):
    script = checkout / "utils" / "new_recipe.sh"
    assert run(script, "--help").returncode == 0 and "usage" in run(script, "--help").stdout
    assert run(script).returncode == 2


def test_the_mini_recipe_can_be_copied():
    lines = (ROOT / "egs2" / "mini" / "ssl1" / "run.sh").read_text().splitlines()
    assert "--corpus mini" in [line.strip() for line in lines] and lines[1].startswith("# ")
