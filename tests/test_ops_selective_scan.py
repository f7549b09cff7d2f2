import pytest
import torch

from espnet_mamba.ops.selective_scan import BACKENDS, selective_scan

FAST = [name for name in BACKENDS if name != "reference"]


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
    tensors = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
    tensors["A"] = -torch.rand(channels, states, dtype=dtype)
    return tensors


def run(tensors, backend, **options):
    """Outputs and the gradients of all inputs."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    y, state = selective_scan(**leaves, **options, return_state=True, backend=backend)
    (y.pow(2).sum() + state.pow(3).sum()).backward()
    return {"y": y.detach(), "last": state.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("frames", [1, 2, 3, 63, 1000, 4097])
@pytest.mark.parametrize("reverse", [False, True])
def test_outputs_and_gradients_are_the_references(backend, frames, reverse):
    tensors = inputs(3, frames)
    lengths = torch.tensor([frames, max(1, frames // 2), 1])
    options = {"lengths": lengths, "reverse": reverse}
    expected, got = run(tensors, "reference", **options), run(tensors, backend, **options)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("left_out", ["z", "D_skip", "dt_bias", "state"])
def test_optional_inputs(backend, left_out):
    tensors = inputs(2, 20)
    del tensors[left_out]
    expected, got = run(tensors, "reference"), run(tensors, backend)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9)


def test_chunked_gradcheck_over_several_segments(monkeypatch):
    from espnet_mamba.ops.selective_scan import chunked

    monkeypatch.setattr(chunked, "SEGMENT_ELEMENTS", 1)  # one chunk a segment, so that carries between them matter
    tensors = [t.requires_grad_() for t in inputs(2, 19, channels=2, states=2).values()]
    names = list(inputs(1, 1))

    def call(*values):
        return selective_scan(**dict(zip(names, values, strict=True)), return_state=True, backend="torch")

    assert torch.autograd.gradcheck(call, tensors, atol=1e-6)


@pytest.mark.parametrize("backend", list(BACKENDS))
@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_never_read(backend, reverse):
    tensors = inputs(2, 30)
    over_time = ("x", "dt", "Bmat", "Cmat", "z")
    clean = {name: tensor[:1, :17].clone() if name in over_time else tensor for name, tensor in tensors.items()}
    clean["state"] = tensors["state"][:1]
    for name in over_time:
        tensors[name][0, 17:] = float("nan")
    lengths = torch.tensor([17, 30])
    y, last = selective_scan(**tensors, lengths=lengths, reverse=reverse, return_state=True, backend=backend)
    alone, alone_last = selective_scan(**clean, reverse=reverse, return_state=True, backend=backend)
    torch.testing.assert_close(y[:1, :17], alone)
    torch.testing.assert_close(last[:1], alone_last)
    assert (y[0, 17:] == 0).all()


@pytest.mark.parametrize("backend", list(BACKENDS))
def test_chunks_through_the_state_equal_the_whole(backend):
    tensors = inputs(2, 50)
    whole, end = selective_scan(**tensors, return_state=True, backend=backend)
    state, parts = tensors.pop("state"), []
    for begin, stop in ((0, 1), (1, 20), (20, 50)):
        part = {n: t[:, begin:stop] if n in ("x", "dt", "Bmat", "Cmat", "z") else t for n, t in tensors.items()}
        y, state = selective_scan(**part, state=state, return_state=True, backend=backend)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, end)


def test_bfloat16_keeps_its_state_in_float32():
    tensors = {n: t.to(torch.bfloat16) for n, t in inputs(2, 40).items()}
    y, state = selective_scan(**tensors, return_state=True)
    exact = selective_scan(**{n: t.double() for n, t in tensors.items()}, backend="reference")
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=1e-2)  # one rounding of the output, not one per frame


def test_bad_arguments_are_named():
    tensors = inputs(2, 8)
    with pytest.raises(ValueError, match="'cudda' is not one of: auto reference torch"):
        selective_scan(**tensors, backend="cudda")
    with pytest.raises(ValueError, match="Bmat has shape"):
        selective_scan(**(tensors | {"Bmat": tensors["Bmat"][:, :7]}))
    with pytest.raises(ValueError, match="lengths has shape"):
        selective_scan(**tensors, lengths=torch.tensor([8]))
