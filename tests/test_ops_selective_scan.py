"""The public scan: every backend that this machine runs against the definition in float64."""

import logging

import pytest
import torch

from espnet_mamba.ops import selection
from espnet_mamba.ops.selection import relative_error
from espnet_mamba.ops.selective_scan import BACKENDS, Direction, backends, selective_scan, selective_scan_bidirectional

OVER_TIME = ("x", "dt", "Bmat", "Cmat", "z")
# backend -> the type it is tested in and how far it may be from the definition, relative to the largest value
LIMITS = {"torch": (torch.float64, 1e-10)}
if not backends.unavailable("cpu"):
    LIMITS["cpu"] = (torch.float32, 5e-6)
FAST = list(LIMITS)


def inputs(batch, frames, channels=5, states=4, dtype=torch.float64):
    shapes = {
        "x": (batch, frames, channels),
        "dt": (batch, frames, channels),
        "A": (channels, states),
        "Bmat": (batch, frames, states),
        "Cmat": (batch, frames, states),
        "D_skip": (channels,),
        "z": (batch, frames, channels),
        "dt_bias": (channels,),
        "state": (batch, channels, states),
    }
    tensors = {name: torch.randn(shape, dtype=torch.float32).to(dtype) for name, shape in shapes.items()}
    tensors["A"] = -torch.rand(channels, states, dtype=torch.float32).to(dtype)
    return tensors


def run(tensors, backend, dtype=torch.float64, **options):
    """Outputs and the gradients of all inputs."""
    leaves = {name: tensor.to(dtype).clone().requires_grad_() for name, tensor in tensors.items()}
    y, state = selective_scan(**leaves, **options, return_state=True, backend=backend)
    (y.pow(2).sum() + state.pow(2).sum()).backward()
    return {"y": y.detach(), "last": state.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def assert_agrees(got, expected, limit):
    for name, value in expected.items():
        assert relative_error(got[name], value) <= limit, name


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("frames", [1, 2, 3, 63, 1000, 4097])
@pytest.mark.parametrize("reverse", [False, True])
def test_outputs_and_gradients_are_the_references(backend, frames, reverse):
    tensors, (dtype, limit) = inputs(3, frames), LIMITS[backend]
    options = {"lengths": torch.tensor([frames, frames // 2, 1]), "reverse": reverse}
    assert_agrees(run(tensors, backend, dtype, **options), run(tensors, "reference", **options), limit)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("channels", [1, 16, 37])
@pytest.mark.parametrize("states", [1, 16, 24, 64])
def test_numbers_of_channels_and_states(backend, channels, states):
    tensors, (dtype, limit) = inputs(2, 33, channels, states), LIMITS[backend]
    assert_agrees(run(tensors, backend, dtype), run(tensors, "reference"), limit)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("left_out", ["z", "D_skip", "dt_bias", "state", "softplus"])
def test_optional_inputs(backend, left_out):
    tensors, (dtype, limit) = inputs(2, 20), LIMITS[backend]
    options = {"dt_softplus": left_out != "softplus"}
    if left_out == "softplus":
        tensors["dt"], tensors["dt_bias"] = tensors["dt"].abs() * 0.1, tensors["dt_bias"].abs()
    else:
        del tensors[left_out]
    assert_agrees(run(tensors, backend, dtype, **options), run(tensors, "reference", **options), limit)


def pair_of_directions(tensors, dtype):
    leaves = {name: tensor.to(dtype).clone().requires_grad_() for name, tensor in tensors.items()}
    own = ("dt", "A", "Bmat", "Cmat", "D_skip", "dt_bias", "state")
    ahead = Direction(*(leaves[name] for name in own), reverse=False)
    back = Direction(*(leaves[name].flip(0) * 0.5 for name in own), reverse=True)
    return leaves, (ahead, back)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("gated", [True, False])
def test_two_directions_in_one_call_are_two_calls_added(backend, gated):
    tensors, (dtype, limit) = inputs(3, 41, 21, 16), LIMITS[backend]
    lengths = torch.tensor([41, 17, 0])
    leaves, directions = pair_of_directions(tensors, torch.float64)
    y = 0
    for dt, A, Bmat, Cmat, D_skip, dt_bias, state, reverse in directions:
        options = {"lengths": lengths, "reverse": reverse, "state": state, "backend": "reference"}
        z = leaves["z"] if gated else None
        y = y + selective_scan(leaves["x"], dt, A, Bmat, Cmat, D_skip, z, dt_bias, **options)
    y.square().sum().backward()
    expected = {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    leaves, directions = pair_of_directions(tensors, dtype)
    z = leaves["z"] if gated else None
    y = selective_scan_bidirectional(leaves["x"], directions, z, lengths=lengths, backend=backend)
    y.square().sum().backward()
    assert_agrees({"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}, expected, limit)


def test_chunked_gradcheck_over_several_segments(monkeypatch):
    from espnet_mamba.ops.selective_scan import chunked

    monkeypatch.setattr(chunked, "SEGMENT_ELEMENTS", 1)  # one chunk a segment, so that carries between them matter
    tensors = [t.requires_grad_() for t in inputs(2, 19, channels=2, states=2).values()]
    names = list(inputs(1, 1))

    for reverse in (False, True):

        def call(*values, reverse=reverse):
            arguments = dict(zip(names, values, strict=True))
            return selective_scan(**arguments, return_state=True, reverse=reverse, backend="torch")

        assert torch.autograd.gradcheck(call, tensors, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_never_read(backend, reverse):
    dtype = LIMITS.get(backend, (torch.float64,))[0]
    tensors = inputs(2, 30, dtype=dtype)
    clean = {name: tensor[:1, :17].clone() if name in OVER_TIME else tensor for name, tensor in tensors.items()}
    clean["state"] = tensors["state"][:1]
    for name in OVER_TIME:
        tensors[name][0, 17:] = float("nan")
    leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    lengths = torch.tensor([17, 30])
    y, last = selective_scan(**leaves, lengths=lengths, reverse=reverse, return_state=True, backend=backend)
    alone, alone_last = selective_scan(**clean, reverse=reverse, return_state=True, backend=backend)
    torch.testing.assert_close(y[:1, :17], alone)
    torch.testing.assert_close(last[:1], alone_last)
    assert (y[0, 17:] == 0).all()
    (y.sum() + last.sum()).backward()
    for name, leaf in leaves.items():
        assert torch.isfinite(leaf.grad).all(), name
        assert name not in OVER_TIME or (leaf.grad[0, 17:] == 0).all(), name


@pytest.mark.parametrize("backend", FAST)
def test_reverse_is_flip_of_the_valid_part_forward_and_flip_back(backend):
    tensors = inputs(2, 30, dtype=LIMITS[backend][0])
    lengths = torch.tensor([17, 30])

    def flip(tensor):
        return torch.stack([torch.cat([row[:n].flip(0), row[n:]]) for row, n in zip(tensor, lengths, strict=True)])

    flipped = {name: flip(tensor) if name in OVER_TIME else tensor for name, tensor in tensors.items()}
    expected = flip(selective_scan(**flipped, lengths=lengths, backend=backend))
    torch.testing.assert_close(selective_scan(**tensors, lengths=lengths, reverse=True, backend=backend), expected)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_chunks_through_the_state_equal_the_whole(backend):
    tensors = inputs(2, 50, dtype=LIMITS.get(backend, (torch.float64,))[0])
    whole, end = selective_scan(**tensors, return_state=True, backend=backend)
    state, parts = tensors.pop("state"), []
    for begin, stop in ((0, 1), (1, 20), (20, 50)):
        part = {n: t[:, begin:stop] if n in OVER_TIME else t for n, t in tensors.items()}
        y, state = selective_scan(**part, state=state, return_state=True, backend=backend)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, end, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_same_bits_twice_and_strided_inputs_change_nothing(backend):
    dtype = LIMITS[backend][0]
    tensors = inputs(2, 40, 24, 16, dtype)
    first, second = run(tensors, backend, dtype), run(tensors, backend, dtype)
    assert all(torch.equal(first[name], second[name]) for name in first)
    wide = torch.cat([tensors["x"], tensors["z"]], -1)  # as in_proj's output
    x, z = wide.chunk(2, dim=-1)
    in_channels_first = tensors["dt"].transpose(1, 2).contiguous().transpose(1, 2)
    strided = tensors | {"x": x, "z": z, "dt": in_channels_first}
    expected = selective_scan(**tensors, backend=backend)
    assert relative_error(selective_scan(**strided, backend=backend), expected) <= LIMITS[backend][1]


def test_bfloat16_keeps_its_state_in_float32():
    tensors = {n: t.to(torch.bfloat16) for n, t in inputs(2, 40).items()}
    y, state = selective_scan(**tensors, return_state=True)
    exact = selective_scan(**{n: t.double() for n, t in tensors.items()}, backend="reference")
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)  # one rounding of the output, not one per frame


@pytest.mark.parametrize("backend", FAST)
def test_autocast_does_not_reach_into_the_scan(backend):
    tensors = inputs(2, 40, dtype=torch.float32)
    expected = run(tensors, backend, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(tensors, backend, torch.float32)
    assert_agrees(got, expected, 1e-6)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_no_frames_and_empty_utterances(backend):
    tensors = inputs(2, 0, dtype=torch.float32)
    y, state = selective_scan(**tensors, return_state=True, backend=backend)
    assert y.shape == (2, 0, 5) and torch.equal(state, tensors["state"])
    tensors = inputs(2, 6, dtype=torch.float32)
    y, state = selective_scan(**tensors, lengths=torch.tensor([0, 6]), return_state=True, backend=backend)
    assert (y[0] == 0).all() and torch.equal(state[0], tensors["state"][0]) and torch.isfinite(y).all()


def test_the_plain_form_compiles_into_one_graph():
    tensors = inputs(2, 20, dtype=torch.float32)
    compiled = torch.compile(lambda t: selective_scan(**t, backend="torch"), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tensors), selective_scan(**tensors, backend="torch"))


def test_a_wrong_backend_is_found_on_first_use_and_not_taken(monkeypatch, caplog):
    if "cpu" not in FAST:
        pytest.skip("no compiled kernels on this machine")
    kernels = backends.kernels_of("cpu")

    def corrupted(scan_inputs, keep):
        out = kernels.forward(scan_inputs, keep)
        out.y[0, 0, 0] += 1.0
        return out

    broken = type(kernels)(corrupted, kernels.backward, kernels.dtypes)
    monkeypatch.setattr(backends, "kernels_of", lambda name: broken if name == "cpu" else None)
    monkeypatch.setattr(backends.SELECTOR, "passed", {})
    selection.say_once.cache_clear()
    tensors = inputs(2, 9, dtype=torch.float32)
    with caplog.at_level(logging.WARNING):
        y, again = selective_scan(**tensors), selective_scan(**tensors)
    assert torch.equal(y, selective_scan(**tensors, backend="torch")) and torch.equal(y, again)
    assert [r.message for r in caplog.records if "backend cpu: is off by" in r.message and "using torch" in r.message]
    assert len(caplog.records) == 1, "said once"


def test_the_check_on_first_use_leaves_the_random_state_alone(monkeypatch):
    monkeypatch.setattr(backends.SELECTOR, "passed", {})
    tensors, before = inputs(1, 4, dtype=torch.float32), torch.get_rng_state()
    with torch.inference_mode():
        selective_scan(**tensors)
    assert torch.equal(before, torch.get_rng_state())


def test_torchs_default_type_and_device_change_nothing():
    tensors = inputs(2, 9, dtype=torch.float32)
    expected = run(tensors, "auto", torch.float32)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = run(tensors, "auto", torch.float32)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_environment_names_the_backend(monkeypatch):
    tensors = inputs(2, 9, dtype=torch.float32)
    monkeypatch.setenv(selection.FORCE, "reference")
    assert torch.equal(selective_scan(**tensors), selective_scan(**tensors, backend="reference"))
    monkeypatch.setenv(selection.FORCE, "cudda")
    with pytest.raises(ValueError, match="ESPNET_MAMBA_BACKEND 'cudda' is not one of: auto reference torch"):
        selective_scan(**tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "cudda"}, "'cudda' is not one of: auto reference torch cpu triton mamba_ssm"),
        ({"backend": "mamba_ssm"}, "'mamba_ssm' runs on cuda, given x on cpu"),
        ({"Bmat": torch.zeros(2, 7, 4)}, r"Bmat has shape \(2, 7, 4\), expected \(2, 8, 4\)"),
        ({"z": torch.zeros(2, 8, 4)}, r"z has shape \(2, 8, 4\), expected \(2, 8, 5\)"),
        ({"state": torch.zeros(1, 5, 4)}, r"state has shape \(1, 5, 4\), expected \(2, 5, 4\)"),
        ({"A": torch.zeros(4, 5)}, r"A has shape \(4, 5\), expected \(5, N\)"),
        ({"x": torch.zeros(8, 5)}, r"x is torch.float32 \(8, 5\), expected floats of shape \(B, T, E\)"),
        ({"x": torch.zeros(2, 8, 5, dtype=torch.long)}, "x is torch.int64"),
        ({"dt": torch.zeros(2, 8, 5, dtype=torch.long)}, "dt is torch.int64, expected floats"),
        ({"D_skip": torch.zeros(5, device="meta")}, "D_skip is on meta, expected cpu, where x is"),
        ({"lengths": torch.tensor([8])}, r"lengths has shape \(1,\), expected \(2,\)"),
        ({"lengths": torch.tensor([8, 9])}, r"lengths\[1\] is 9, expected 0 to 8 frames"),
        ({"lengths": torch.tensor([-1, 8])}, r"lengths\[0\] is -1, expected 0 to 8 frames"),
        ({"lengths": torch.tensor([8.0, 4.0])}, r"lengths is torch.float32, expected integers \(frames\)"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        selective_scan(**(inputs(2, 8, dtype=torch.float32) | changes))
    assert "\n" not in str(caught.value)


def test_float64_is_not_for_the_compiled_kernels(caplog):
    tensors = inputs(2, 8)
    selection.say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        y = selective_scan(**tensors, backend="cpu")
    assert torch.equal(y, selective_scan(**tensors, backend="torch"))
    assert len(caplog.records) == 1 and set(BACKENDS) >= set(FAST)


@pytest.mark.skipif("cpu" not in FAST, reason="no compiled kernels on this machine")
def test_two_million_frames():
    """Eleven hours of audio: nothing counts frames or elements in 16 bits, and errors do not grow with time."""
    frames = 2**21
    tensors = inputs(1, frames, channels=3, states=2, dtype=torch.float32)
    tensors["dt"] -= 2.0
    got = run(tensors, "cpu", torch.float32, reverse=True)
    assert_agrees(got, run(tensors, "torch", torch.float64, reverse=True), 5e-6)
