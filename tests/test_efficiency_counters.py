"""What other counters read for our models is ours without the parts that they are said to read as 0."""

from __future__ import annotations

import pytest
from test_efficiency_macs import SSAMBA, TINY, VARIANTS

from espnet_mamba.bin import model_info
from espnet_mamba.efficiency.macs import count_macs, count_macs_of
from espnet_mamba.efficiency.macs_counters import counters_table, read_counters
from espnet_mamba.ops.selective_scan.backends import unavailable


@pytest.mark.parametrize("name", ["extbimamba", "mamba2", "attention", "conbimamba", "ssamba"])
def test_what_other_counters_read_is_ours_without_the_parts_named(name):
    if unavailable("cpu"):
        pytest.skip(f"the compiled kernels do not run here: {unavailable('cpu')}")
    config = SSAMBA if name == "ssamba" else VARIANTS[name]
    parts = count_macs_of(config, 16000)
    for reading in read_counters(config, 16000):
        if reading.macs is not None:
            assert reading.unexplained(parts) == 0, reading


@pytest.mark.parametrize("package", ["fvcore", "calflops"])
def test_fvcore_and_calflops_read_the_scan_as_0(package):
    pytest.importorskip(package, reason=f"{package} is not installed; pip install {package}")
    reading = next(r for r in read_counters(TINY, 16000) if r.counter == package)
    parts = count_macs(TINY, 16000)
    assert "scan" in reading.zero
    assert reading.products <= sum(parts.values()) - parts["scan"]


def test_a_counter_that_is_not_there_is_a_line_of_its_own(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    table = counters_table([TINY], 1.0).splitlines()
    assert table[-2:] == [
        "| `tiny` | calflops | not installed | - | - |",
        "| `tiny` | fvcore | not installed | - | - |",
    ]
    assert table[2].split("|")[4].strip() == "100.0 %"


def test_model_info_prints_macs_and_counters(root, monkeypatch, capsys):
    argv = ["model_info", "--config", "mamba_tiny", str(root / "conf/ssamba/ssamba_mini.yaml"), "--lengths", "1", "2"]
    monkeypatch.setattr("sys.argv", [*argv, "--macs"])
    model_info.main()
    assert "| `ssamba_mini` | scan |" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["model_info", "--config", "mamba_tiny", "--counters", "--lengths", "0.1"])
    model_info.main()
    assert "| `mamba_tiny` | the same, our operators registered | 0.0" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["model_info", "--macs"])
    with pytest.raises(ValueError, match="no model; give --all"):
        model_info.main()
