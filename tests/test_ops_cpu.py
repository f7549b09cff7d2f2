"""The compiled CPU kernels, called directly, in each instruction set of this processor, against float64 definitions."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from espnet_mamba.ops import compiled
from espnet_mamba.ops.causal_conv1d import cpu as conv_cpu
from espnet_mamba.ops.causal_conv1d.torch_conv import conv_torch
from espnet_mamba.ops.selective_scan import cpu as scan_cpu
from espnet_mamba.ops.selective_scan.protocol import Direction, Kernels, ScanInputs
from espnet_mamba.ops.selective_scan.reference import scan_reference

TOLERANCE = 5e-6  # of the largest magnitude of each tensor; sums over thousands of frames come closest
FIELDS = Direction._fields[:-1]
BOTH, BACK = (False, True), (True,)
pytestmark = pytest.mark.skipif(compiled.library() is None, reason=f"no kernels: {compiled.unavailable_reason()}")


@pytest.fixture(params=list(compiled.VARIANTS))
def variant(request: pytest.FixtureRequest) -> str:
    if request.param not in compiled.runnable_variants():
        pytest.skip(f"this processor does not run {request.param}")
    return request.param


@pytest.fixture(autouse=True)
def _uninitialised_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN: what is not written shows
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    T: int = 63
    E: int = 37
    N: int = 16
    B: int = 2
    lengths: tuple[int, ...] | None = None
    reverse: tuple[bool, ...] = (False,)
    without: tuple[str, ...] = ()  # of z, D_skip, dt_bias, state, grad_last
    dt_softplus: bool = True
    step: float = 0.5  # scale of dt before softplus


CASES = {
    "one frame": Case(T=1, E=5, N=1),
    "two frames": Case(T=2, E=5, N=24),
    "three frames, both": Case(T=3, E=130, N=16, reverse=BOTH),
    "63": Case(),
    "63 back": Case(reverse=BACK),
    "63 both": Case(E=130, N=24, reverse=BOTH),
    "both, reversed first": Case(E=5, N=1, reverse=(True, False)),
    "bare": Case(without=("z", "D_skip", "dt_bias", "state", "grad_last")),
    "bare both": Case(without=("z", "D_skip", "dt_bias", "state", "grad_last"), reverse=BOTH, N=3),
    "no state, gradient of the last": Case(without=("state",), N=64, T=20),
    "no bias, no softplus": Case(without=("dt_bias",), dt_softplus=False, reverse=BOTH),
    "no z": Case(without=("z",), N=64, E=130, T=33, reverse=BACK),
    "lengths": Case(B=5, T=50, lengths=(50, 0, 1, 33, 16)),
    "lengths back": Case(B=5, T=50, lengths=(50, 0, 1, 33, 16), reverse=BACK, without=("z",)),
    "lengths both": Case(B=5, T=50, E=130, lengths=(50, 0, 1, 33, 16), reverse=BOTH, N=5),
    "lengths bare": Case(B=3, T=50, lengths=(50, 0, 17), without=("state", "grad_last", "dt_bias"), reverse=BOTH),
    "1000": Case(T=1000, E=5, reverse=BOTH),
    "4097": Case(T=4097, E=5, B=1),
}


def make(case: Case, seed: int = 0) -> ScanInputs:
    """Float32 inputs; state sizes stay near 1, so that every part counts."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    directions = []
    for reverse in case.reverse:
        dt = case.step * normal(case.B, case.T, case.E)
        dt = dt - 1 if case.dt_softplus else dt.abs()
        A = -0.1 - case.N * torch.rand(case.E, case.N, generator=generator)
        optional = {
            "D_skip": normal(case.E),
            "dt_bias": 0.3 * normal(case.E),
            "state": normal(case.B, case.E, case.N),
        }
        weights = normal(case.B, case.T, case.N), normal(case.B, case.T, case.N)
        optional = {name: None if name in case.without else value for name, value in optional.items()}
        directions.append(Direction(dt, A, *weights, **optional, reverse=reverse))
    x, z = normal(case.B, case.T, case.E), normal(case.B, case.T, case.E)
    lengths = None if case.lengths is None else torch.tensor(case.lengths)
    return ScanInputs(x, None if "z" in case.without else z, lengths, tuple(directions), case.dt_softplus)


def make_grads(case: Case) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    generator = torch.Generator().manual_seed(99)
    grad_y = torch.randn(case.B, case.T, case.E, generator=generator)
    of_last = [torch.randn(case.B, case.E, case.N, generator=generator) for _ in case.reverse]
    if "grad_last" in case.without:
        of_last = [None] * len(of_last)
    elif len(of_last) == 2:
        of_last[0] = None  # a gradient for one of two
    return grad_y, tuple(of_last)


@functools.cache
def expected(case: Case) -> dict[str, Tensor]:
    """Outputs and gradients of the float64 reference."""
    inputs, (grad_y, grad_last) = make(case), make_grads(case)

    def leaf(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.double().requires_grad_()

    directions = tuple(Direction(*map(leaf, d[:-1]), d.reverse) for d in inputs.directions)
    inputs = inputs._replace(x=leaf(inputs.x), z=leaf(inputs.z), directions=directions)
    y, last = scan_reference(inputs)
    loss = (y * grad_y).sum() + sum((a * b).sum() for a, b in zip(last, grad_last, strict=True) if b is not None)
    leaves = {"x": inputs.x, "z": inputs.z}
    leaves |= {f"{name}{i}": value for i, d in enumerate(directions) for name, value in zip(FIELDS, d, strict=False)}
    leaves = {name: value for name, value in leaves.items() if value is not None}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    outputs = {"y": y} | {f"last{i}": state for i, state in enumerate(last)}
    grads = {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: value.detach() for name, value in (outputs | grads).items()}


def with_nan_padding(tensor: Tensor | None, lengths: Tensor | None) -> Tensor | None:
    if tensor is None or lengths is None:
        return tensor
    return tensor.masked_fill((torch.arange(tensor.shape[1]) >= lengths[:, None])[..., None], torch.nan)


def run(
    kernels: Kernels,
    inputs: ScanInputs,
    grad_y: Tensor,
    grad_last: tuple[Tensor | None, ...],
    grad_z: Tensor | None = None,
) -> dict[str, Tensor]:
    y, last, kept = kernels.forward(inputs, True)
    grads = kernels.backward(inputs, kept, grad_y, grad_last, grad_z)
    found = {"y": y} | {f"last{i}": state for i, state in enumerate(last)} | {"grad x": grads.x, "grad z": grads.z}
    for i, direction in enumerate(grads.directions):
        found |= {f"grad {name}{i}": value for name, value in zip(FIELDS, direction, strict=True)}
    return {name: value for name, value in found.items() if value is not None}


def run_case(kernels: Kernels, case: Case) -> dict[str, Tensor]:
    inputs, (grad_y, grad_last) = make(case), make_grads(case)
    pad = functools.partial(with_nan_padding, lengths=inputs.lengths)
    directions = tuple(d._replace(dt=pad(d.dt), Bmat=pad(d.Bmat), Cmat=pad(d.Cmat)) for d in inputs.directions)
    return run(
        kernels, inputs._replace(x=pad(inputs.x), z=pad(inputs.z), directions=directions), pad(grad_y), grad_last
    )


def relative_error(found: Tensor, wanted: Tensor) -> float:
    largest = wanted.abs().max().item()
    return ((found.double() - wanted).abs().max() / (largest or 1.0)).item()


def assert_close(
    found: dict[str, Tensor], wanted: dict[str, Tensor], lengths: object = None, tolerance: float = TOLERANCE
) -> None:
    """Fail where a tensor is further off than the tolerance, or where one over frames is not 0 in the padding."""
    assert found.keys() == wanted.keys()
    errors = {name: relative_error(found[name], wanted[name]) for name in wanted}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, wrong
    for name, value in found.items():
        if lengths is not None and value.dim() == 3 and "state" not in name and "last" not in name:
            assert all((row[length:] == 0).all() for row, length in zip(value, lengths, strict=True)), name


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


# ---- the scan ----


@pytest.mark.parametrize("name", CASES)
def test_scan_is_the_reference_whatever_stands_in_the_padding(variant: str, name: str) -> None:
    assert_close(run_case(scan_cpu.make_kernels(variant), CASES[name]), expected(CASES[name]), CASES[name].lengths)


def test_scan_of_no_frames_hands_the_state_through(variant: str) -> None:
    case = replace(CASES["lengths both"], lengths=(0, 0, 0, 0, 0))
    found, (_, grad_last) = run_case(scan_cpu.make_kernels(variant), case), make_grads(case)
    assert torch.equal(found["last1"], make(case).directions[1].state)
    assert torch.equal(found["grad state1"], grad_last[1])
    assert (found["grad A0"] == 0).all() and (found["grad Bmat1"] == 0).all()


@pytest.mark.parametrize("reverse", [BACK, BOTH, (True, False)])
def test_scan_gives_the_same_bits_for_one_and_two_threads_and_again(two_threads: None, reverse: tuple) -> None:
    case = Case(B=3, T=70, E=300, lengths=(70, 3, 40), reverse=reverse)
    found = run_case(scan_cpu.KERNELS, case)
    assert_same(run_case(scan_cpu.KERNELS, case), found)
    torch.set_num_threads(1)
    assert_same(run_case(scan_cpu.KERNELS, case), found)


def test_scan_keeps_one_state_for_sixteen_frames_or_none() -> None:
    inputs = make(Case(B=1, T=160, E=128, N=16))
    (y, last, kept), other = scan_cpu.KERNELS.forward(inputs, False), scan_cpu.KERNELS.forward(inputs, True)
    assert kept == () and torch.equal(y, other.y) and torch.equal(last[0], other.last[0])
    assert sum(states.numel() for states in other.kept) == inputs.x.numel()


@pytest.mark.parametrize("name", ["63 both", "three frames, both", "no z"])
def test_scan_reads_slices_in_place(variant: str, name: str) -> None:
    case = CASES[name]
    kernels, inputs, (grad_y, grad_last) = scan_cpu.make_kernels(variant), make(case), make_grads(case)
    whole = torch.full((case.B, case.T, 2 * case.E + 3), torch.nan)

    def sliced(frames: Tensor) -> Tensor:
        wide = torch.full((case.B, case.T + 2, frames.shape[2] + 7), torch.nan)[:, 1:-1, 4:-3]
        return wide.copy_(frames)

    directions = tuple(d._replace(dt=sliced(d.dt), Bmat=sliced(d.Bmat), Cmat=sliced(d.Cmat)) for d in inputs.directions)
    z = None if inputs.z is None else sliced(inputs.z)
    views = inputs._replace(x=sliced(inputs.x), z=z, directions=directions)
    found = run(kernels, views, sliced(grad_y), grad_last, whole[..., case.E : 2 * case.E])
    assert_same(found, run(kernels, inputs, grad_y, grad_last))
    if z is not None:  # written where it was told, and nowhere else
        assert torch.equal(whole[..., case.E : 2 * case.E], found["grad z"])
        assert whole[..., : case.E].isnan().all() and whole[..., 2 * case.E :].isnan().all()


def test_scan_takes_channels_that_are_not_neighbours_and_expanded_gradients() -> None:
    case = CASES["63 both"]
    inputs, (_, grad_last) = make(case), make_grads(case)

    def turned(frames: Tensor) -> Tensor:
        return frames.transpose(1, 2).contiguous().transpose(1, 2)

    directions = tuple(d._replace(dt=turned(d.dt), Bmat=turned(d.Bmat), Cmat=turned(d.Cmat)) for d in inputs.directions)
    views = inputs._replace(x=turned(inputs.x), z=turned(inputs.z), directions=directions)
    ones = torch.ones(())
    for grad_y in (ones.expand(inputs.x.shape), torch.randn(case.E).expand(inputs.x.shape)):
        found = run(scan_cpu.KERNELS, views, grad_y, grad_last)
        assert_same(found, run(scan_cpu.KERNELS, inputs, grad_y.contiguous(), grad_last))


def test_scan_with_steps_that_wipe_the_state_out_is_finite_and_right(variant: str) -> None:
    case = Case(T=40, step=200.0, reverse=BOTH)
    assert_close(run_case(scan_cpu.make_kernels(variant), case), expected(case))


def test_a_nan_stays_in_its_utterance_and_channel(variant: str) -> None:
    case = Case(B=3, T=40, E=37, reverse=BOTH)
    inputs, grads = make(case), make_grads(case)
    inputs.x[1, 20, 5] = torch.nan
    found = run(scan_cpu.make_kernels(variant), inputs, *grads)
    assert found["y"][1, :, 5].isnan().any()
    for name, value in found.items():
        if name.endswith(("A0", "A1", "skip0", "skip1", "bias0", "bias1")):  # one number per channel
            assert value[torch.arange(case.E) != 5].isfinite().all(), name
        elif "Bmat" in name or "Cmat" in name:  # sums over channels
            assert value[[0, 2]].isfinite().all(), name
        else:
            value = value.clone()
            (value[1, :, 5] if value.shape[1] == case.T else value[1, 5]).zero_()
            assert value.isfinite().all(), name


def test_an_unusual_nan_is_not_made_a_number(variant: str) -> None:
    case = Case(B=1, T=8, E=16)
    inputs = make(case)
    all_ones = torch.tensor(-1, dtype=torch.int32).view(torch.float32)  # a NaN with every bit set
    inputs.z[0, 3, 2] = all_ones
    inputs.directions[0].dt[0, 5, 7] = all_ones
    y = scan_cpu.make_kernels(variant).forward(inputs, False).y
    assert y[0, 3, 2].isnan() and y[0, 5:, 7].isnan().all() and y.isfinite().sum() == y.numel() - 4


def test_scan_leaves_denormal_numbers_on() -> None:
    run_case(scan_cpu.KERNELS, CASES["one frame"])
    assert (torch.full((64,), 1e-39) * 0.5 > 0).all()


def test_scan_says_when_there_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_cpu, "_library", lambda variant: SimpleNamespace(scan_forward=lambda scan: -1))
    with pytest.raises(MemoryError, match="selective_scan: no memory"):
        scan_cpu.KERNELS.forward(make(CASES["one frame"]), False)


def test_scan_of_a_growing_state_follows_it(variant: str) -> None:
    inputs = make(Case(T=12, E=5, N=5, without=("dt_bias",), dt_softplus=False))
    inputs = inputs._replace(directions=(inputs.directions[0]._replace(A=-inputs.directions[0].A),))
    found, wanted = scan_cpu.make_kernels(variant).forward(inputs, False).y, scan_reference(inputs)[0].double()
    assert relative_error(found, wanted) < 1e-4
    inputs.directions[0].dt[0, 3] = 1e4  # 2^72000
    assert not (scan_cpu.make_kernels(variant).forward(inputs, False).last[0][0].abs() < 1e20).any()


# ---- the convolution ----

CONV_CASES = {  # B, T, E, W, lengths, state, bias
    "one frame": (2, 1, 5, 4, None, True, True),
    "two taps": (2, 63, 37, 2, None, True, True),
    "three taps": (2, 21, 16, 3, (21, 2), False, True),
    "five taps": (2, 21, 16, 5, (21, 2), True, False),
    "eight taps": (3, 140, 37, 8, (140, 4, 129), True, True),
    "spans": (2, 260, 37, 4, None, False, True),
    "wide": (2, 131, 530, 4, (131, 128), True, False),
    "lengths": (5, 140, 130, 4, (140, 0, 1, 127, 130), True, True),
    "bare": (1, 1000, 16, 4, None, False, False),
}


def make_conv(name: str) -> tuple[list[Tensor | None], Tensor | None, Tensor]:
    """Return [x, weight, bias, state], lengths, grad_y."""
    B, T, E, W, lengths, state, bias = CONV_CASES[name]
    shapes = [(B, T, E), (E, W), (E,) if bias else None, (B, W - 1, E) if state else None]
    generator = torch.Generator().manual_seed(0)
    tensors = [None if shape is None else torch.randn(shape, generator=generator) for shape in shapes]
    return tensors, None if lengths is None else torch.tensor(lengths), torch.randn(B, T, E, generator=generator)


def run_conv(
    tensors: list[Tensor | None],
    lengths: Tensor | None,
    grad_y: Tensor,
    reverse: bool,
    variant: str | None = None,
    grad_x: Tensor | None = None,
) -> dict[str, Tensor]:
    x, weight, bias, state = tensors
    x, grad_y = with_nan_padding(x, lengths), with_nan_padding(grad_y, lengths)
    y = conv_cpu.forward(x, weight, bias, lengths, reverse, state, variant)
    grads = conv_cpu.backward(x, weight, bias, lengths, reverse, state, grad_y, grad_x, variant)
    found = dict(zip(("y", "x", "weight", "bias", "state"), (y, *grads), strict=True))
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", CONV_CASES)
def test_convolution_is_the_definition_whatever_stands_in_the_padding(variant: str, name: str, reverse: bool) -> None:
    tensors, lengths, grad_y = make_conv(name)
    leaves = [None if v is None else v.double().requires_grad_() for v in tensors]
    y = conv_torch(*leaves[:3], lengths, reverse, leaves[3])
    names = [name for name, v in zip(("x", "weight", "bias", "state"), leaves, strict=True) if v is not None]
    grads = torch.autograd.grad((y * grad_y).sum(), [v for v in leaves if v is not None])
    wanted = {"y": y.detach()} | dict(zip(names, grads, strict=True))
    assert_close(run_conv(tensors, lengths, grad_y, reverse, variant), wanted, lengths, 2e-6)


@pytest.mark.parametrize("reverse", [False, True])
def test_convolution_gives_the_same_bits_for_one_and_two_threads(two_threads: None, reverse: bool) -> None:
    arguments = make_conv("lengths")
    found = run_conv(*arguments, reverse)
    torch.set_num_threads(1)
    assert_same(run_conv(*arguments, reverse), found)


def test_convolution_reads_and_writes_slices_in_place() -> None:
    (x, weight, bias, state), lengths, grad_y = make_conv("spans")
    num_channels = x.shape[2]
    found = run_conv([x, weight, bias, state], lengths, grad_y, False)
    wide = torch.full((*x.shape[:2], 2 * num_channels), torch.nan)
    wide[..., :num_channels] = x
    into = torch.full_like(wide, torch.nan)
    arguments = [wide[..., :num_channels], weight.t().contiguous().t(), bias, state]
    sliced = run_conv(arguments, lengths, grad_y, False, grad_x=into[..., num_channels:])
    assert_same(sliced, found)
    assert torch.equal(into[..., num_channels:], found["x"]) and into[..., :num_channels].isnan().all()
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2), weight, bias, state]
    assert_same(run_conv(turned, lengths, grad_y, False), found)
    one = torch.ones(()).expand(x.shape)
    assert_same(
        run_conv([x, weight, bias, state], None, one, False),
        run_conv([x, weight, bias, state], None, one.contiguous(), False),
    )


def test_convolution_keeps_a_nan_in_its_utterance_and_channel(variant: str) -> None:
    tensors, _, grad_y = make_conv("spans")
    tensors[0][1, 20, 5] = torch.nan
    found = run_conv(tensors, None, grad_y, False, variant)
    assert found["y"][1, 20:24, 5].isnan().all() and found["y"].isnan().sum() == 4
    assert found["x"][1, 17:24, 5].isnan().all() and found["x"].isnan().sum() == 7
    assert found["weight"].isnan().any(1).nonzero().flatten().tolist() == [5]
