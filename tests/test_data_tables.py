"""Kaldi tables, the manifest, frame labels and replaced folders."""

import pytest

from espnet_mamba.data.alignment import frame_labels
from espnet_mamba.data.folders import refuse_foreign_files, replaced_folders
from espnet_mamba.data.kaldi import Segment, read_ctm, read_table, write_ctm, write_table
from espnet_mamba.data.manifest import Utterance, read_manifest


def test_table_keeps_order_and_spaces_and_round_trips(tmp_path):
    table = {"b": "/a b/é.flac", "a": "x  y"}
    write_table(tmp_path / "wav.scp", table)
    assert list(read_table(tmp_path / "wav.scp").items()) == list(table.items())


def test_table_names_every_duplicate_with_its_line(tmp_path):
    (tmp_path / "text").write_text("u1 A\nu2 B\nu1 C\nu2 D\n")
    with pytest.raises(ValueError, match=r"text:3: duplicate id 'u1', first on line 1.*text:4: duplicate id 'u2'"):
        read_table(tmp_path / "text")


def test_empty_value_only_where_allowed(tmp_path):
    (tmp_path / "text").write_text("u1 A\nu2\n")
    with pytest.raises(ValueError, match="text:2: id 'u2' has no value"):
        read_table(tmp_path / "text")
    assert read_table(tmp_path / "text", allow_empty=True) == {"u1": "A", "u2": ""}


def test_table_accepts_tabs_windows_line_ends_and_a_byte_order_mark(tmp_path):
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbfu1\tA B\r\n\r\nu2 C\r\n")
    assert read_table(tmp_path / "text") == {"u1": "A B", "u2": "C"}


def test_missing_and_non_utf8_tables_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing_here"):
        read_table(tmp_path / "nothing_here")
    (tmp_path / "text").write_bytes("u1 é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"text: not UTF-8 .* iconv"):
        read_table(tmp_path / "text")


def test_ctm_sorts_by_time_and_round_trips(tmp_path):
    (tmp_path / "a.ctm").write_text("u 1 0.5 0.25 B\nu 1 0.0 0.5 A\n")
    segments = read_ctm(tmp_path / "a.ctm")
    assert segments == {"u": [Segment(0.0, 0.5, "A"), Segment(0.5, 0.75, "B")]}
    write_ctm(tmp_path / "b.ctm", segments)
    assert read_ctm(tmp_path / "b.ctm") == segments


@pytest.mark.parametrize("line", ["u 1 0.0 0.5", "u 1 zero 0.5 A", "u 1 -1 0.5 A", "u 1 0 nan A", "u 1 0 -0.1 A"])
def test_ctm_names_a_bad_line(tmp_path, line):
    (tmp_path / "a.ctm").write_text(f"u 1 0 1 A\n{line}\n")
    with pytest.raises(ValueError, match="a.ctm:2"):
        read_ctm(tmp_path / "a.ctm")


def test_frame_labels_by_hand():
    # Centres at samples 200, 520, 840, 1160, 1480: 12.5, 32.5, 52.5, 72.5, 92.5 ms.
    segments = [Segment(0.0, 0.0325, "A"), Segment(0.0325, 0.06, "B"), Segment(0.08, 0.0925, "C")]
    # 32.5 ms is B's start (held) and not A's end; 72.5 ms lies in the gap; 92.5 ms is C's end (not held).
    assert frame_labels(segments, 6) == ["A", "B", "B", "sil", "sil", "sil"]
    assert frame_labels(segments[::-1], 6) == frame_labels(segments, 6)
    assert frame_labels([], 2) == ["sil", "sil"]


def test_frame_labels_at_100_hz():
    assert frame_labels([Segment(0.0, 0.02, "A")], 3, hop=160) == ["A", "sil", "sil"]


def test_frame_labels_do_not_slip_by_rounding():
    # Frame 3 is centred on sample 1160, 0.0725 s; as a CTM's start + duration that is a hair more in floating point.
    start = 0.0425 + 0.03
    assert start * 16000 > 1160
    assert frame_labels([Segment(start, 1.0, "A")], 4)[3] == "A"


def write_dump(folder, **tables):
    folder.mkdir()
    for name, text in tables.items():
        (folder / name.replace("wav", "wav.scp")).write_text(text)


def test_manifest_reads_sorted_with_and_without_text(tmp_path):
    write_dump(tmp_path / "a", wav="u2 /b c.wav\nu1 /a.wav\n", utt2num_samples="u1 5\nu2 6\n", utt2spk="u1 s\nu2 s\n")
    expected = [Utterance("u1", "/a.wav", 5, "s", ""), Utterance("u2", "/b c.wav", 6, "s", "")]
    assert read_manifest(tmp_path / "a") == expected


def test_manifest_names_the_stage_and_the_odd_id(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"stage 2 \(check\)"):
        read_manifest(tmp_path)
    write_dump(tmp_path / "a", wav="u1 /a\n", utt2num_samples="u1 5\n", utt2spk="u1 s\n", text="u1 A\nu9 B\n")
    with pytest.raises(ValueError, match="text: 1 ids differ from wav.scp, the first is 'u9'"):
        read_manifest(tmp_path / "a")
    write_dump(tmp_path / "b", wav="u1 /a\n", utt2num_samples="u1 many\n", utt2spk="u1 s\n")
    with pytest.raises(ValueError, match="u1: 'many' is not a count"):
        read_manifest(tmp_path / "b")


def test_replaced_folders_replace_whole_folders(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "old").touch()
    with replaced_folders(tmp_path, ["train", "dev"]) as folders:
        (folders["train"] / "new").touch()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dev", "train"]
    assert [p.name for p in (tmp_path / "train").iterdir()] == ["new"]


def test_replaced_folders_leave_all_as_it_was_on_error(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "old").touch()
    with pytest.raises(RuntimeError):
        with replaced_folders(tmp_path, ["train", "dev"]) as folders:
            (folders["dev"] / "new").touch()
            raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["train"]
    with pytest.raises(RuntimeError):
        with replaced_folders(tmp_path / "x" / "y", ["train"]):
            raise RuntimeError
    assert not (tmp_path / "x").exists()


def test_what_a_killed_writer_left_is_removed(tmp_path):
    (tmp_path / ".writing.999999999").mkdir()
    with replaced_folders(tmp_path, ["train"]):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["train"]


def test_a_users_own_files_are_not_replaced(tmp_path):
    (tmp_path / "text").touch()
    refuse_foreign_files(tmp_path)
    (tmp_path / "my.wav").touch()
    with pytest.raises(ValueError, match="'my.wav', which would be lost"):
        refuse_foreign_files(tmp_path)
