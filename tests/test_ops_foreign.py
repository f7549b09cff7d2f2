"""Against code that nobody here wrote: transformers' MambaMixer. And: the benchmark scripts run."""

import subprocess
import sys

import pytest
import torch

from espnet_mamba.layers.bimamba import ExtBiMamba
from espnet_mamba.layers.mamba import Mamba

WIDTH, STATES, KERNEL, EXPAND = 24, 5, 4, 2
# Of each tensor's largest value. In float64 MambaMixer still rounds A, B, D and dt's bias to float32.
LIMIT = {torch.float32: 1e-5, torch.float64: 5e-7}


def mixer(dtype):
    """A MambaMixer on its slow path, with weights drawn so that none is at a special value."""
    pytest.importorskip("transformers")
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(
        hidden_size=WIDTH,
        state_size=STATES,
        conv_kernel=KERNEL,
        expand=EXPAND,
        num_hidden_layers=1,
        use_mambapy=False,
    )
    theirs = MambaMixer(config, layer_idx=0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            spread = {"A_log": 0.3, "D": 1.0, "conv1d.weight": 0.5, "conv1d.bias": 0.3, "dt_proj.bias": 0.5}.get(
                name, 0.3
            )
            centre = parameter if name in ("A_log", "dt_proj.bias") else 0.0
            parameter.copy_(centre + spread * torch.randn_like(parameter))
    return theirs.to(dtype)


def results(call, x, module):
    """The output, and the gradients of the input and of all parameters by name."""
    x = x.clone().requires_grad_()
    y = call(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad((y * weights).sum(), [x, *parameters])
    return {"y": y.detach(), "x": grads[0]} | dict(zip(names, grads[1:], strict=True))


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        # A single frame does not decay: A's gradient is exactly 0.
        error = float((got[name] - value).abs().max() / value.abs().max().clamp(min=1e-30))
        assert error < LIMIT[value.dtype], f"{name}: off by {error:.1e} of its maximum"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("frames", [1, 3, 67])
def test_mamba_is_mamba_mixer(dtype, frames):
    theirs = mixer(dtype)
    ours = Mamba(WIDTH, STATES, KERNEL, EXPAND).to(dtype)
    ours.load_state_dict(theirs.state_dict())  # key by key, all of them
    x = torch.randn(3, frames, WIDTH, dtype=dtype)
    assert_same(results(lambda x: ours(x)[0], x, ours), results(theirs, x, theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extbimamba_is_two_mixers_glued_by_flips(dtype):
    theirs = torch.nn.ModuleDict({"forward_mamba": mixer(dtype), "backward_mamba": mixer(dtype)})
    ours = ExtBiMamba(WIDTH, STATES, KERNEL, EXPAND).to(dtype)
    ours.load_state_dict(theirs.state_dict())

    def glued(x):
        return theirs["forward_mamba"](x) + theirs["backward_mamba"](x.flip(1)).flip(1)

    x = torch.randn(2, 41, WIDTH, dtype=dtype)
    assert_same(results(lambda x: ours(x)[0], x, ours), results(glued, x, theirs))


@pytest.mark.parametrize("frames", [7, 40])
def test_the_select_loop_of_the_benchmark_is_the_scan(root, frames, monkeypatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    import peers

    case = peers.Case(2, 12, frames, 3, dtype=torch.float64)
    expected, got = (peers.build_job(name, case).run("forward+backward") for name in ("reference", "select"))
    for theirs, ours in zip((got[0].mT, *got[1]), (expected[0], *expected[1]), strict=True):
        theirs = theirs.mT if theirs.shape != ours.shape else theirs  # channels come first there
        torch.testing.assert_close(theirs, ours, rtol=1e-10, atol=1e-10)


def run_script(root, name, *arguments):
    command = [sys.executable, str(root / "benchmarks" / name), *arguments, "--rounds", "1", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_scan_benchmark_prints_its_table(root, tmp_path):
    # torch.compile takes half a minute to start, transformers a few seconds to import: not here
    peers = ["select", "mambapy", "projections", "layer"]
    report = tmp_path / "scan.md"
    printed = run_script(root, "bench_scan.py", "--shapes", "1,16,20,4", "--peers", *peers, "--output", str(report))
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")]
    assert {"torch", "loop with select (B, E, T)", "the block's four matmuls"} <= set(rows)
    assert "goal cpu / the block's four matmuls at (4, 1536, 500, 16): not measured" in printed
    assert report.read_text() == printed


def test_block_benchmark_prints_its_tables(root):
    options = ["--shapes", "1,20,8", "--seconds", "0.4", "--layer_width", "32", "--no-memory"]
    printed = run_script(root, "bench_block.py", *options)
    assert "failed" not in printed
    for row in ("| four matmuls", "| layer extbimamba", "| rest of layer mamba", "| mamba_base layer"):
        assert row in printed
    assert "goal whole block in both directions / its matmuls" in printed


def test_a_shape_that_is_none_is_one_line(root, monkeypatch, capsys):
    monkeypatch.syspath_prepend(root / "benchmarks")
    import bench_scan

    with pytest.raises(SystemExit):
        bench_scan.main(["--shapes", "4,1536,500"])
    assert "'4,1536,500' is not of the form B,E,T,N" in capsys.readouterr().err.splitlines()[-1]
