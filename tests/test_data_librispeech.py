"""LibriSpeech's tree becomes the recipe's lists, with sexes and alignments where they are there."""

import os
import subprocess
import sys

import pytest
from librispeech_tree import PARTS, make_tree

from espnet_mamba.data.check import check_sets
from espnet_mamba.data.kaldi import Segment, read_ctm, read_table
from espnet_mamba.data.librispeech import find_root, prepare
from espnet_mamba.data.textgrid import read_textgrid

SETS = {"train": ["train-clean-5"], "dev": ["dev-clean-2"], "test": ["test-clean"]}


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "a corpus")


def test_readers_chapters_and_texts_come_out_as_lists(tree, tmp_path, capsys):
    prepare(tree, tmp_path / "data", SETS, nj=2)
    train = {name: read_table(tmp_path / "data/train" / name) for name in ("wav.scp", "text", "utt2spk", "spk2gender")}
    assert list(train["wav.scp"]) == sorted(train["wav.scp"]) and len(train["wav.scp"]) == 12
    assert train["wav.scp"]["103-1240-0001"] == str(tree / "train-clean-5/103/1240/103-1240-0001.flac")
    assert train["text"]["1088-1241-0002"] == "AND THEN THE RAIN"
    assert set(train["utt2spk"].values()) == {"103", "1088"} and train["spk2gender"] == {"1088": "f", "103": "f"}
    assert not (tmp_path / "data/test/spk2gender").exists()  # its reader is not in SPEAKERS.TXT
    assert "test: 6 recordings, 1 speakers, 1 of unknown sex" in capsys.readouterr().out
    check_sets(tmp_path / "data", tmp_path / "dump", list(SETS))
    prepare(tree, tmp_path / "data", SETS, speaker="chapter")  # replaces its own files
    assert read_table(tmp_path / "data/train/utt2spk")["103-1240-0001"] == "103-1240"
    assert read_table(tmp_path / "data/train/spk2gender")["1088-1241"] == "f"


def test_what_lacks_audio_or_text_is_named_by_stage_2(tree, tmp_path, capsys):
    (tree / "train-clean-5/103/1240/103-1240-0002.flac").unlink()
    (tree / "dev-clean-2/84/1241/84-1241.trans.txt").unlink()
    prepare(tree, tmp_path / "data", SETS)
    with pytest.raises(ValueError, match="4 bad items"):
        check_sets(tmp_path / "data", tmp_path / "dump", list(SETS))
    report = capsys.readouterr().err
    assert report.count("no_text") >= 3 and "103-1240-0002.flac" in report
    check_sets(tmp_path / "data", tmp_path / "dump", list(SETS), "skip")
    assert len(read_table(tmp_path / "dump/dev/wav.scp")) == 3


def test_wrong_trees_are_refused_and_nothing_is_written(tree, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no part train-clean-100; it has dev-clean-2, test-clean, train-clean-5"
    ):
        find_root(tree, ["train-clean-5", "train-clean-100"])
    assert find_root(tree.parent, PARTS) == tree == find_root(tree, PARTS)
    with pytest.raises(ValueError, match="part test-clean: given twice"):
        prepare(tree, tmp_path / "data", SETS | {"dev": ["test-clean"]})
    transcript = tree / "test-clean/61/1240/61-1240.trans.txt"
    transcript.write_text("61-1240-0000 A\n61-9-0000 B\n61-1240-0000 C\n")
    with pytest.raises(ValueError, match=r"61-1240.trans.txt:2: id '61-9-0000' .*trans.txt:3: id '61-1240-0000'"):
        prepare(tree, tmp_path / "data", SETS)
    (tree / "empty/1/2").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty: no <reader>"):
        prepare(tree, tmp_path / "data", {"train": ["empty"]})
    assert not (tmp_path / "data").exists()


def text_grid(tiers):
    """A long TextGrid as the Montreal aligner writes it; tiers: name -> (start, end, text)."""
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", "xmax = 0.5", "tiers? <exists>"]
    lines += [f"size = {len(tiers)}", "item []:"]
    for number, (name, rows) in enumerate(tiers.items(), start=1):
        lines += [f"    item [{number}]:", '        class = "IntervalTier"', f'        name = "{name}"']
        lines += ["        xmin = 0", "        xmax = 0.5", f"        intervals: size = {len(rows)}"]
        for index, (start, end, text) in enumerate(rows, start=1):
            lines += [f"        intervals [{index}]:", f"            xmin = {start}", f"            xmax = {end}"]
            lines += [f'            text = "{text}"']
    return "\n".join(lines) + "\n"


def align(folder, tree, part, leave_out=()):
    """Write a TextGrid for each utterance of ``part``: the first word after a pause, each word one phone."""
    for transcript in sorted((tree / part).rglob("*.trans.txt")):
        place = folder / transcript.parent.relative_to(tree)
        place.mkdir(parents=True, exist_ok=True)
        for utt_id, *words in map(str.split, transcript.read_text().splitlines()):
            spans = [(0.1 + i / 10, 0.2 + i / 10) for i in range(len(words))]
            rows = {"words": [(0, 0.1, "")], "phones": [(0, 0.1, "sp")]}
            rows["words"] += [(*span, word.lower()) for span, word in zip(spans, words, strict=True)]
            rows["phones"] += [(*span, "AH1") for span in spans]
            if utt_id not in leave_out:
                (place / f"{utt_id}.TextGrid").write_text(text_grid(rows))


def test_textgrids_become_ctm_that_stage_2_accepts(tree, tmp_path, capsys):
    for part in PARTS:
        align(tmp_path / "grids", tree, part, leave_out=["61-1240-0000"])
    odd = tmp_path / "grids/dev-clean-2/84/1240/84-1240-0001.TextGrid"
    odd.write_text(odd.read_text().replace('"said"', '"<unk>"'))
    prepare(tree, tmp_path / "data", SETS, alignments_dir=tmp_path / "grids", nj=2)
    check_sets(tmp_path / "data", tmp_path / "dump", list(SETS))
    phones, words = (read_ctm(tmp_path / "dump/dev" / name)["84-1240-0001"] for name in ("phones.ctm", "words.ctm"))
    assert phones[:2] == [Segment(0.0, 0.1, "sil"), Segment(0.1, 0.2, "AH")] and len(phones) == 4
    assert [row.label for row in words] == ["SHE", "SAID", "SO"] and words[0].start == 0.1
    assert "1 of 6 utterances have no phones.ctm" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "data/test").iterdir()) == ["text", "utt2spk", "wav.scp"]
    prepare(tree, tmp_path / "data", SETS, alignments_dir=tmp_path / "grids", unaligned="drop")
    assert len(read_ctm(tmp_path / "data/test/words.ctm")) == len(read_table(tmp_path / "data/test/text")) == 5


def test_words_of_another_text_are_no_alignment(tree, tmp_path, capsys):
    align(tmp_path / "grids", tree, "dev-clean-2")
    transcript = tree / "dev-clean-2/84/1240/84-1240.trans.txt"
    transcript.write_text(transcript.read_text().replace("ONE", "TWO"))
    prepare(tree, tmp_path / "data", SETS, alignments_dir=tmp_path / "grids")
    names = {path.name for path in (tmp_path / "data/dev").iterdir()}
    assert "phones.ctm" in names and "words.ctm" not in names
    assert "1 of 6 utterances have no words.ctm" in capsys.readouterr().out


def test_ctm_files_serve_too_and_an_empty_folder_is_refused(tree, tmp_path):
    (tmp_path / "ctm/dev").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="neither .*TextGrid nor phones.ctm"):
        prepare(tree, tmp_path / "data", SETS, alignments_dir=tmp_path / "ctm")
    ids = [f"84-{chapter}-000{number}" for chapter in ("1240", "1241") for number in range(3)]
    (tmp_path / "ctm/dev/phones.ctm").write_text("".join(f"{utt_id} 1 0.0 0.3 AA\n" for utt_id in ids))
    prepare(tree, tmp_path / "data", SETS, alignments_dir=tmp_path / "ctm")
    assert read_ctm(tmp_path / "data/dev/phones.ctm")[ids[5]] == [Segment(0.0, 0.3, "AA")]
    assert not (tmp_path / "data/train/phones.ctm").exists()


def test_textgrid_forms_and_faults(tmp_path):
    path = tmp_path / "a.TextGrid"
    path.write_text(text_grid({"words": [(0, 0.5, 'say ""7"" 3')], "phones": []}), encoding="utf-16")
    assert read_textgrid(path) == {"words": [Segment(0.0, 0.5, 'say "7" 3')], "phones": []}
    point = '"TextTier"\n"p"\n0\n1\n1\n0.5\n"x"\n'
    short = f'"ooTextFile"\n"TextGrid"\n0\n1\n<exists>\n2\n{point}"IntervalTier"\n"w"\n0\n1\n1\n0\n1e-1\n"y"'
    path.write_text(short)
    assert read_textgrid(path) == {"w": [Segment(0.0, 0.1, "y")]}
    for text, message in (
        (short[:-12], "ends in the middle"),
        (short.replace("1e-1", "-2"), "'y' ends at -2 s, before its start 0 s"),
        ("1 2 3", "not a TextGrid"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"a.TextGrid: .*{message}"):
            read_textgrid(path)


@pytest.mark.parametrize("recipe", ["librispeech", "librispeech_100", "mini_librispeech"])
def test_each_recipes_data_script(recipe, tree, tmp_path, root):
    parts = [f"--{name}_parts {' '.join(names)}" for name, names in SETS.items()]
    command = [root / f"egs2/{recipe}/ssl1/local/data.sh", "--data_dir", "data", "--minutes", "25", "--seed", "0"]
    command += ["--nj", "1", "--corpus_dir", tree, *" ".join(parts).split()]
    env = os.environ | {"PYTHONPATH": str(root), "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
    assert len(read_table(tmp_path / "data/train/text")) == 12
    if recipe == "librispeech":  # its own parts are not all there
        result = subprocess.run(command[:-6], capture_output=True, text=True, cwd=tmp_path, env=env)
        assert result.returncode == 2 and result.stderr.startswith("error: ") and "train-other-500" in result.stderr
