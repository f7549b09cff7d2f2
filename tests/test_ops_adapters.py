"""The adapters to mamba-ssm and causal-conv1d, over plain loops of the packages' signatures, and the packages' own."""

import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from espnet_mamba.ops.causal_conv1d import package_adapter
from espnet_mamba.ops.causal_conv1d.torch_conv import conv_torch
from espnet_mamba.ops.selective_scan import mamba_ssm_adapter
from espnet_mamba.ops.selective_scan.protocol import Direction, ScanInputs
from espnet_mamba.ops.selective_scan.reference import scan_reference

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):
    """As published: u, delta, z (B, E, T), A (E, N), B, C (B, N, T); no start state, no lengths."""
    assert all(v is None or v.shape == u.shape for v in (delta, z)) and B.shape == C.shape == (
        len(u),
        *A.T.shape[:1],
        u.shape[2],
    )
    assert A.dtype != torch.bfloat16 and delta.dtype == u.dtype == B.dtype
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    state, outputs = u.new_zeros(len(u), *A.shape), []
    for u_t, d_t, b_t, c_t in zip(*(v.unbind(2) for v in (u, delta, B, C)), strict=True):
        state = torch.exp(d_t[..., None] * A) * state + (d_t * u_t)[..., None] * b_t[:, None]
        outputs.append((state * c_t[:, None]).sum(-1))
    y = torch.stack(outputs, 2) + (0 if D is None else D[:, None] * u)
    y = y if z is None else y * F.silu(z)
    return (y, state) if return_last_state else y


def causal_conv1d_fn(
    x,
    weight,
    bias=None,
    seq_idx=None,
    initial_states=None,
    return_final_states=False,
    final_states_out=None,
    activation=None,
):
    """As published: x (B, E, T), initial_states (B, E, W - 1) with channels as the fastest axis."""
    assert activation == "silu" and 2 <= weight.shape[1] <= 4 and x.shape[1] == len(weight)
    channels_last = x.stride(1) == 1 and x.shape[2] > 1
    if channels_last or initial_states is not None:
        assert x.shape[1] % 8 == 0 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0
    width = weight.shape[1]
    if initial_states is None:
        x = F.pad(x, (width - 1, 0))
    else:
        assert initial_states.stride(1) == 1
        x = torch.cat([initial_states, x], 2)
    return F.silu(F.conv1d(x, weight[:, None], bias, groups=len(weight)))


@pytest.fixture
def packages(monkeypatch):
    scan = types.ModuleType(mamba_ssm_adapter.MODULE)
    scan.selective_scan_fn = selective_scan_fn
    conv = types.ModuleType(package_adapter.MODULE)
    conv.causal_conv1d_fn = causal_conv1d_fn
    for module in (types.ModuleType("mamba_ssm"), types.ModuleType("mamba_ssm.ops"), scan, conv):
        monkeypatch.setitem(sys.modules, module.__name__, module)


def scan_inputs(reverse, lengths=None, without=(), dt_softplus=True, shape=(3, 7, 5), states=4):
    batch, frames, channels = shape

    def leaf(*sizes):
        return torch.randn(sizes, dtype=torch.float64).requires_grad_()

    def direction(flag):
        small = [None if name in without else leaf(channels) for name in ("D_skip", "dt_bias")]
        A = (-torch.rand(channels, states, dtype=torch.float64)).requires_grad_()
        return Direction(leaf(*shape), A, leaf(batch, frames, states), leaf(batch, frames, states), *small, None, flag)

    lengths = None if lengths is None else torch.tensor(lengths)
    z = None if "z" in without else leaf(*shape)
    return ScanInputs(leaf(*shape), z, lengths, tuple(direction(flag) for flag in reverse), dt_softplus)


def leaves(inputs):
    named = {"x": inputs.x, "z": inputs.z}
    for i, direction in enumerate(inputs.directions):
        named |= {f"{name}{i}": value for name, value in direction._asdict().items() if name != "reverse"}
    return {name: value for name, value in named.items() if value is not None}


def results(scan, inputs):
    """Outputs, last states and gradients of everything through y."""
    y, last = scan(inputs)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    grads = torch.autograd.grad((weights * y).sum(), list(leaves(inputs).values()))
    return (
        {"y": y.detach()}
        | {f"last{i}": h.detach() for i, h in enumerate(last)}
        | dict(zip(leaves(inputs), grads, strict=True))
    )


def assert_same(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **(tolerance or CLOSE), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("reverse", [(False,), (True,), (False, True), (True, True)])
@pytest.mark.parametrize("lengths", [None, [7, 3, 0]])
@pytest.mark.parametrize("options", [{}, {"without": ("z", "D_skip", "dt_bias")}, {"dt_softplus": False}])
def test_mamba_ssm_adapter_has_our_semantics(packages, reverse, lengths, options):
    inputs = scan_inputs(reverse, lengths, **options)
    assert mamba_ssm_adapter.refuses(inputs) == "" and mamba_ssm_adapter.available() == ""
    # float64 to the reference's last bit but for the gate, which two directions share in float32
    tolerance = {"rtol": 2e-5, "atol": 2e-5} if len(reverse) > 1 else CLOSE
    assert_same(results(mamba_ssm_adapter.scan, inputs), results(scan_reference, inputs), **tolerance)


def test_mamba_ssm_adapter_does_not_let_padding_through(packages):
    inputs = scan_inputs((False, True), [7, 3, 0])
    clean = results(mamba_ssm_adapter.scan, inputs)
    with torch.no_grad():
        for name, value in leaves(inputs).items():
            if value.shape[:2] == (3, 7):
                value[1, 3:], value[2] = float("nan"), float("nan")
                assert value.isnan().any(), name
    assert_same(results(mamba_ssm_adapter.scan, inputs), clean, rtol=0, atol=0)


def test_mamba_ssm_adapter_says_what_the_kernel_cannot_do(packages):
    inputs = scan_inputs((False,))
    started = inputs._replace(directions=(inputs.directions[0]._replace(state=torch.zeros(3, 5, 4)),))
    assert "start state" in mamba_ssm_adapter.refuses(started)
    assert "257" in mamba_ssm_adapter.refuses(scan_inputs((False,), shape=(1, 1, 1), states=257))
    with pytest.raises(ValueError, match="start state"):
        mamba_ssm_adapter.scan(started)
    _, last = mamba_ssm_adapter.scan(inputs)
    with pytest.raises(RuntimeError, match="no gradient of the last state"):
        last[0].sum().backward()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", [None, [9, 4, 0]])
@pytest.mark.parametrize(("channels", "with_state"), [(8, False), (8, True), (5, False)])
def test_causal_conv1d_adapter_has_our_semantics(packages, reverse, lengths, channels, with_state):
    def leaf(*shape):
        return torch.randn(shape, dtype=torch.float64).requires_grad_()

    x, weight, bias = leaf(3, 9, channels), leaf(channels, 4), leaf(channels)
    state = leaf(3, 3, channels) if with_state else None
    ends = None if lengths is None else torch.tensor(lengths)
    wide = F.pad(x, (1, 3)) if channels == 5 else F.pad(x, (8, 3))  # a slice with strides that the kernel cannot read
    tensors = [v for v in (x, weight, bias, state) if v is not None]

    def run(convolution):
        view = wide[..., 1:6] if channels == 5 else wide[..., 8:16]
        y = convolution(view, weight, bias, ends, reverse, state)
        grads = torch.autograd.grad(y.pow(2).sum(), tensors, retain_graph=True)
        return {"y": y.detach()} | {str(i): grad for i, grad in enumerate(grads)}

    assert package_adapter.refuses(x, weight, bias, ends, reverse, state) == "" and package_adapter.available() == ""
    assert_same(run(package_adapter.conv), run(conv_torch))


def test_causal_conv1d_adapter_says_what_the_kernel_cannot_do(packages):
    x, state = torch.randn(1, 6, 5), torch.randn(1, 3, 5)
    assert "multiple of 8" in package_adapter.refuses(x, torch.randn(5, 4), None, None, False, state)
    assert "given 5" in package_adapter.refuses(x, torch.randn(5, 5), None, None, False, None)
    with pytest.raises(ValueError, match="2 to 4 taps"):
        package_adapter.conv(x, torch.randn(5, 5), None, None, False, None)
    x[0, 4:] = float("nan")
    y = package_adapter.conv(x, torch.randn(5, 4), None, torch.tensor([4]), True, None)
    assert y.isfinite().all() and not y[0, 4:].any()


@pytest.mark.parametrize("adapter", [mamba_ssm_adapter, package_adapter])
def test_a_missing_package_is_one_line(monkeypatch, adapter):
    monkeypatch.setitem(
        sys.modules, adapter.MODULE.split(".")[0], None
    )  # what import finds of a module that is not there
    monkeypatch.delitem(sys.modules, adapter.MODULE, raising=False) if "." in adapter.MODULE else None
    reason = adapter.available()
    assert "cannot be imported" in reason and "\n" not in reason


def test_a_build_without_the_cuda_kernel_is_not_available(packages):
    sys.modules[mamba_ssm_adapter.MODULE].selective_scan_cuda = None
    assert "built without" in mamba_ssm_adapter.available()


@pytest.fixture
def published(monkeypatch):
    """The packages' own plain functions; their CUDA halves are stubs, so no GPU build is needed."""
    for name in ("selective_scan_cuda", "causal_conv1d_cuda"):
        if importlib.util.find_spec(name) is None:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def load(name):
        try:
            return importlib.import_module(name)
        except Exception as error:
            pytest.skip(f"{name} cannot be imported: {error}")

    before = set(sys.modules)
    yield load
    for name in set(sys.modules) - before:  # imported over the stubs, so of no use to anyone else
        if name.partition(".")[0] in ("mamba_ssm", "causal_conv1d"):
            del sys.modules[name]


@pytest.mark.parametrize("without", [(), ("z", "D_skip", "dt_bias")])
def test_reference_is_mamba_ssms(published, without):
    theirs = published(mamba_ssm_adapter.MODULE).selective_scan_ref
    inputs = scan_inputs((False,), without=without, shape=(2, 11, 6))
    tensors = {name.rstrip("0"): value.detach().float().requires_grad_() for name, value in leaves(inputs).items()}
    columns = {name: tensors[name].transpose(1, 2) for name in ("x", "dt", "Bmat", "Cmat", "z") if name in tensors}
    y, last = theirs(
        columns["x"],
        columns["dt"],
        tensors["A"],
        columns["Bmat"],
        columns["Cmat"],
        D=tensors.get("D_skip"),
        z=columns.get("z"),
        delta_bias=tensors.get("dt_bias"),
        delta_softplus=True,
        return_last_state=True,
    )
    expected_y, (expected_last,) = scan_reference(inputs)
    ((y.transpose(1, 2) ** 2).sum() + (last**2).sum()).backward()
    ((expected_y**2).sum() + (expected_last**2).sum()).backward()
    got = {"y": y.transpose(1, 2), "last": last} | {name: value.grad for name, value in tensors.items()}
    expected = {"y": expected_y, "last": expected_last} | {n.rstrip("0"): v.grad for n, v in leaves(inputs).items()}
    for name, value in expected.items():
        error = ((got[name] - value).abs().max() / value.abs().max()).item()
        assert error < 5e-6, f"{name}: {error:.1e} of the maximum"


@pytest.mark.parametrize("with_state", [False, True])
def test_convolution_is_causal_conv1ds(published, with_state):
    theirs = published(package_adapter.MODULE).causal_conv1d_interface.causal_conv1d_ref
    x, weight, bias, state = (torch.randn(s, dtype=torch.float64) for s in ((2, 9, 6), (6, 4), (6,), (2, 3, 6)))
    tensors = [v.requires_grad_() for v in (x, weight, bias) + ((state,) if with_state else ())]
    before = state.transpose(1, 2) if with_state else None
    y = theirs(x.transpose(1, 2), weight, bias, initial_states=before, activation="silu").transpose(1, 2)
    ours = conv_torch(x, weight, bias, None, False, state if with_state else None)
    torch.testing.assert_close(ours, y, **CLOSE)
    for a, b in zip(*(torch.autograd.grad(v.pow(2).sum(), tensors) for v in (ours, y)), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
