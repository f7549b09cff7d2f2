"""What every command shares."""

import importlib
import sys

import pytest

from espnet_mamba.bin.cli import imports_without


def test_a_package_is_away_within_and_back_after(tmp_path, monkeypatch):
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy/__init__.py").write_text("value = 1\n")
    (tmp_path / "heavy/part.py").write_text("value = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    with imports_without("heavy"), pytest.raises(ImportError):
        importlib.import_module("heavy.part")
    assert importlib.import_module("heavy.part").value == 2
    with imports_without("heavy"):  # what is there already stays
        assert importlib.import_module("heavy").value == 1
    assert "heavy" in sys.modules
    for name in ("heavy", "heavy.part"):
        del sys.modules[name]
