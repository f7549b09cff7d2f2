import errno
import os

import pytest

from espnet_mamba.bin.cli import run_main
from espnet_mamba.data.files import atomic_path, read_json, write_json
from espnet_mamba.names import nearest


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(OSError), atomic_path(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert read_json(tmp_path / "a.json") == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_one_line_with_the_remedy(capsys):
    def fill():
        with open("/dev/full", "w") as handle:
            handle.write("x" * 100)

    with pytest.raises(SystemExit) as exit_:
        run_main(fill)
    assert exit_.value.code == 2
    assert "No space left on device; free some space" in capsys.readouterr().err


def test_mistakes_are_one_line(capsys):
    def mistake():
        raise ValueError("utt1: 3 samples; at least 400 wanted")

    with pytest.raises(SystemExit):
        run_main(mistake)
    assert capsys.readouterr().err == "error: utt1: 3 samples; at least 400 wanted\n"
    with pytest.raises(RuntimeError):  # our own errors keep their traceback

        def ours():
            raise RuntimeError("bug")

        run_main(ours)


def test_damaged_json_names_the_file(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match="a.json: not valid JSON"):
        read_json(tmp_path / "a.json")


def test_nearest():
    assert nearest("modle", ["other", "model"]) == "model" and nearest("zzz", ["model"]) is None
