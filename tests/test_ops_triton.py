"""The Triton kernels against the float64 reference: on a GPU where there is one, else in Triton's interpreter.

The interpreter takes milliseconds for one program's step, so shapes are tiny and one program has all channels.
"""

import importlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import pytest
import torch

from espnet_mamba.ops.causal_conv1d.torch_conv import conv_torch
from espnet_mamba.ops.selective_scan.protocol import Direction, ScanInputs
from espnet_mamba.ops.selective_scan.reference import scan_reference

triton = pytest.importorskip("triton", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODULES = (
    "espnet_mamba.ops.selective_scan.triton_kernels",
    "espnet_mamba.ops.selective_scan.triton_scan",
    "espnet_mamba.ops.causal_conv1d.triton_conv",
)
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class Loaded(NamedTuple):
    scan: object
    conv: object


@pytest.fixture(scope="module")
def kernels():
    """Copies of the modules of our own, interpreted where there is no GPU; nothing of it is left for other tests.

    ``@triton.jit`` decides when it decorates, so the modules are imported anew; ``tl.sum`` was decorated when triton
    was imported, perhaps long ago, so it is decorated again.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in MODULES:
            package, _, module = name.rpartition(".")
            patch.delitem(sys.modules, name, raising=False)
            patch.setattr(importlib.import_module(package), module, None, raising=False)  # what import sets is undone
        if DEVICE == "cpu":
            from triton.runtime import interpreter

            patch.setattr(triton.knobs.runtime, "interpret", True)
            total = triton.language.sum
            patch.setattr(triton.language, "sum", interpreter.InterpretedFunction(getattr(total, "fn", total)))
            scalar = interpreter._patch_lang_tensor

            def with_index(tensor):  # numpy >= 2.4 takes no array of one element for an integer, as range() needs
                scalar(tensor)
                tensor.__index__ = lambda self: int(self.handle.data.item())

            patch.setattr(interpreter, "_patch_lang_tensor", with_index)
        _, scan, conv = (importlib.import_module(name) for name in MODULES)
        patch.setattr(scan, "SEGMENT", 4)  # so that tiny inputs have several
        patch.setattr(conv, "BLOCK_T", 8)
        patch.setattr(conv, "MAX_SPANS", 2)
        yield Loaded(scan, conv)
        for name in MODULES:
            sys.modules.pop(name)


def draw(shape, dtype=torch.float32):
    return torch.randn(shape).to(DEVICE, dtype)


def scan_inputs(
    shape, reverse=(False,), lengths=None, without=(), dtype=torch.float32, dt_softplus=True, strided=False
):
    batch, frames, channels, states = shape

    def rows(width):  # strided: a slice of a wider projection, as in the mixers
        if not strided:
            return draw((batch, frames, width), dtype)
        return draw((batch + 1, frames, width + 3), dtype)[1:, :, 2 : 2 + width]

    def direction(flag):
        dt = rows(channels) - 1 if dt_softplus else rows(channels).abs() / 4
        small = [draw((channels,)), draw((channels,)).abs() / 4, draw((batch, channels, states))]
        small = [None if name in without else v for name, v in zip(("D_skip", "dt_bias", "state"), small, strict=True)]
        return Direction(dt, -draw((channels, states)).exp(), rows(states), rows(states), *small, flag)

    lengths = None if lengths is None else torch.tensor(lengths, device=DEVICE)
    z = None if "z" in without else rows(channels)
    return ScanInputs(rows(channels), z, lengths, tuple(direction(flag) for flag in reverse), dt_softplus)


def expected_scan(inputs, grad_y, grad_last):
    """The reference's outputs and gradients, in float64: ``{name: tensor}``."""

    def leaf(tensor):
        return None if tensor is None else tensor.detach().cpu().double().requires_grad_()

    directions = tuple(Direction(*map(leaf, d[:-1]), d.reverse) for d in inputs.directions)
    lengths = None if inputs.lengths is None else inputs.lengths.cpu()
    wide = ScanInputs(leaf(inputs.x), leaf(inputs.z), lengths, directions, inputs.dt_softplus)
    y, last = scan_reference(wide)
    loss = (y * grad_y.cpu().double()).sum()
    loss = loss + sum((h * g.cpu().double()).sum() for h, g in zip(last, grad_last, strict=True) if g is not None)
    loss.backward()
    named = {"y": y, "x": wide.x.grad, "z": None if wide.z is None else wide.z.grad}
    for i, (direction, h) in enumerate(zip(directions, last, strict=True)):
        named[f"last{i}"] = h
        for name, tensor in zip(Direction._fields, direction[:-1], strict=False):
            named[f"{name}{i}"] = None if tensor is None else tensor.grad
    return {name: None if v is None else v.detach() for name, v in named.items()}


def run_scan(kernels, inputs, grad_y=None, grad_last=None, grad_z=None):
    """Outputs and gradients of the kernels: ``{name: tensor}``, and the output's gradients that were used."""
    out = kernels.scan.forward(inputs, True)
    grad_y = torch.randn_like(out.y) if grad_y is None else grad_y
    grad_last = tuple(torch.randn_like(h) for h in out.last) if grad_last is None else grad_last
    grads = kernels.scan.backward(inputs, out.kept, grad_y, grad_last, grad_z)
    named = {"y": out.y, "x": grads.x, "z": grads.z}
    for i, (direction, h) in enumerate(zip(grads.directions, out.last, strict=True)):
        named[f"last{i}"] = h
        named |= {f"{name}{i}": value for name, value in direction._asdict().items()}
    return named, grad_y, grad_last


def assert_close(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert got[name] is None, name
            continue
        error = (got[name].cpu().double() - value.cpu()).abs().max()
        assert error <= tolerance * value.abs().max(), f"{name}: {error / value.abs().max():.1e} of the maximum"


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 1, 1, 1), {}),
        ((2, 2, 5, 5), {"reverse": (True,), "without": ("z", "D_skip", "dt_bias", "state")}),
        ((2, 3, 7, 16), {"reverse": (False, True), "lengths": [3, 1], "without": ("z", "state")}),
        ((1, 17, 19, 16), {"reverse": (True,), "without": ("dt_bias",), "strided": True}),
        ((1, 9, 9, 24), {"reverse": (False, True), "without": ("D_skip", "state"), "strided": True}),
        ((3, 10, 5, 5), {"reverse": (False, True), "lengths": [9, 0, 10]}),
        ((1, 40, 3, 2), {"lengths": [33]}),
        ((1, 5, 17, 1), {"dt_softplus": False, "reverse": (True, False)}),
        ((1, 5, 6, 64), {"dt_softplus": False, "without": ("dt_bias",)}),
    ],
)
def test_scan_is_the_references(kernels, shape, options):
    inputs = scan_inputs(shape, **options)
    got, grad_y, grad_last = run_scan(kernels, inputs)
    assert_close(got, expected_scan(inputs, grad_y, grad_last), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scan_of_half_floats_accumulates_in_float32(kernels, dtype):
    inputs = scan_inputs((1, 9, 6, 4), reverse=(False, True), lengths=[8], dtype=dtype)
    got, grad_y, grad_last = run_scan(kernels, inputs)
    expected = expected_scan(inputs, grad_y, grad_last)
    assert got["y"].dtype == got["dt0"].dtype == got["Bmat1"].dtype == dtype
    assert_close(got, expected, TOLERANCE[dtype])
    single = [name for name, value in got.items() if value.dtype == torch.float32]
    assert {"last0", "A0", "dt_bias1", "state1"} <= set(single)
    assert_close({n: got[n] for n in single}, {n: expected[n] for n in single}, TOLERANCE[torch.float32])


def test_small_steps_keep_their_digits(kernels):
    inputs = scan_inputs((1, 3, 4, 2), without=("dt_bias",))
    direction = inputs.directions[0]
    inputs = inputs._replace(directions=(direction._replace(dt=direction.dt - 14, state=None, D_skip=None),))
    got, grad_y, grad_last = run_scan(kernels, inputs)
    assert_close(got, expected_scan(inputs, grad_y, grad_last), TOLERANCE[torch.float32])


def test_gradients_of_last_states_may_be_missing_and_grad_y_expanded(kernels):
    inputs = scan_inputs((2, 6, 3, 4), reverse=(False, True))
    ones = torch.ones((), device=DEVICE).expand(2, 6, 3)
    given = (None, draw((2, 3, 4)))
    got, *_ = run_scan(kernels, inputs, ones, given)
    assert_close(got, expected_scan(inputs, ones, given), TOLERANCE[torch.float32])


@pytest.mark.parametrize("reverse", [False, True])
def test_padding_is_never_read_and_gradients_there_are_zero(kernels, reverse):
    inputs = scan_inputs((2, 9, 5, 3), reverse=(reverse,), lengths=[9, 4])
    clean, grad_y, grad_last = run_scan(kernels, inputs)

    def spoil(tensor):
        tensor = tensor.clone()
        tensor[1, 4:] = float("nan")
        return tensor

    dirty = tuple(d._replace(dt=spoil(d.dt), Bmat=spoil(d.Bmat), Cmat=spoil(d.Cmat)) for d in inputs.directions)
    dirty = inputs._replace(x=spoil(inputs.x), z=spoil(inputs.z), directions=dirty)
    grad_z = torch.full((2, 9, 8), float("nan"), device=DEVICE)[..., 2:7]
    got, *_ = run_scan(kernels, dirty, spoil(grad_y), grad_last, grad_z)
    assert got["z"] is grad_z
    for name, value in clean.items():
        assert torch.equal(got[name], value), name
        if value.shape[:2] == (2, 9):
            assert not value[1, 4:].any(), name


def test_same_bits_twice(kernels):
    inputs = scan_inputs((1, 6, 17, 4), reverse=(False, True), lengths=[5])
    first, grad_y, grad_last = run_scan(kernels, inputs)
    second, *_ = run_scan(kernels, inputs, grad_y, grad_last)
    for name, value in first.items():
        assert torch.equal(second[name], value), name


def test_nothing_is_kept_unless_asked(kernels):
    inputs = scan_inputs((1, 4, 2, 2))
    kept, unkept = kernels.scan.forward(inputs, True), kernels.scan.forward(inputs, False)
    assert unkept.kept == () and torch.equal(kept.y, unkept.y) and torch.equal(kept.last[0], unkept.last[0])


def test_what_the_scan_refuses(kernels):
    assert kernels.scan.refuses(scan_inputs((1, 1, 1, 256))) == ""
    assert "257" in kernels.scan.refuses(scan_inputs((1, 1, 1, 257)))


CONVOLUTIONS = [
    (2, 1, 3, None, False, False),
    (4, 3, 5, [3, 0, 1], False, True),
    (4, 17, 65, None, True, False),
    (4, 20, 5, [20, 9], True, True),
    (3, 40, 2, [33], False, True),
    (8, 5, 2, [5, 2], True, True),
]


@pytest.mark.parametrize(("width", "frames", "channels", "lengths", "reverse", "with_state"), CONVOLUTIONS)
def test_convolution_is_the_plain_one(kernels, width, frames, channels, lengths, reverse, with_state):
    batch = 1 if lengths is None else len(lengths)
    x = draw((batch, frames, channels + 4))[..., 1 : 1 + channels]
    weight, bias = draw((channels, width)), None if width == 3 else draw((channels,))
    state = draw((batch, width - 1, channels)) if with_state else None
    arguments = (x, weight, bias, None if lengths is None else torch.tensor(lengths, device=DEVICE), reverse, state)
    y = kernels.conv.forward(*arguments)
    grad_y = torch.randn_like(y)
    grad_x = torch.full((batch, frames, channels + 2), float("nan"), device=DEVICE)[..., 1 : 1 + channels]
    grads = kernels.conv.backward(*arguments, grad_y, grad_x)
    assert grads[0] is grad_x
    wide = [None if v is None else v.cpu().double().requires_grad_() for v in (x, weight, bias, state)]
    ends = None if lengths is None else torch.tensor(lengths)
    expected = conv_torch(*wide[:3], ends, reverse, wide[3])
    expected.backward(grad_y.cpu().double())
    names = ("x", "weight", "bias", "state")
    assert_close(
        {"y": y} | dict(zip(names, grads, strict=True)),
        {"y": expected.detach()} | {n: None if v is None else v.grad for n, v in zip(names, wide, strict=True)},
        TOLERANCE[torch.float32],
    )


def test_convolution_never_reads_padding_and_repeats_its_bits(kernels):
    x, weight, bias, lengths = draw((2, 9, 3)), draw((3, 4)), draw((3,)), torch.tensor([9, 4], device=DEVICE)
    grad_y = draw((2, 9, 3))
    for reverse in (False, True):
        clean = kernels.conv.forward(x, weight, bias, lengths, reverse, None)
        grads = kernels.conv.backward(x, weight, bias, lengths, reverse, None, grad_y, None)
        dirty, dirty_y = x.clone(), grad_y.clone()
        dirty[1, 4:] = dirty_y[1, 4:] = float("nan")
        assert torch.equal(kernels.conv.forward(dirty, weight, bias, lengths, reverse, None), clean)
        again = kernels.conv.backward(dirty, weight, bias, lengths, reverse, None, dirty_y, None)
        assert all(torch.equal(a, b) for a, b in zip(again[:3], grads[:3], strict=True))
        assert not clean[1, 4:].any() and not grads[0][1, 4:].any()


def test_convolution_of_half_floats(kernels):
    x, weight, bias = (draw(shape, torch.bfloat16) for shape in ((1, 9, 3), (3, 4), (3,)))
    y = kernels.conv.forward(x, weight, bias, None, False, None)
    grads = kernels.conv.backward(x, weight, bias, None, False, None, torch.ones_like(y), None)
    assert y.dtype == grads[0].dtype == grads[1].dtype == grads[2].dtype == torch.bfloat16
    expected = conv_torch(x.cpu().double(), weight.cpu().double(), bias.cpu().double(), None, False, None)
    assert_close({"y": y}, {"y": expected}, TOLERANCE[torch.bfloat16])


def test_convolution_refuses_widths(kernels):
    with pytest.raises(ValueError, match="9"):
        kernels.conv.forward(draw((1, 4, 2)), draw((2, 9)), None, None, False, None)


def far_memory(shape, strides):
    """A function that places tensors of one shape in one buffer of over 2^31 elements; only written pages are real."""
    reach = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    assert reach > 2**31
    buffer, offsets = torch.empty(reach + 4096, device=DEVICE), itertools.count(0, 32)
    return lambda tensor: buffer.as_strided(shape, strides, next(offsets)).copy_(tensor)


@pytest.mark.slow
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("axis", ["utterances", "frames"])
def test_offsets_past_two_to_the_31(kernels, axis, reverse):
    """Virtual memory on a CPU, 9 GB on a GPU."""
    shape = (2, 3, 4)
    far = far_memory(shape, (2**31 + 8, 8, 1) if axis == "utterances" else (8, 2**30 + 8, 1))
    near = scan_inputs((*shape, 4), reverse=(reverse,), lengths=None if reverse else [3, 3])
    expected, grad_y, grad_last = run_scan(kernels, near)
    direction = near.directions[0]
    moved = direction._replace(dt=far(direction.dt), Bmat=far(direction.Bmat), Cmat=far(direction.Cmat))
    inputs = near._replace(x=far(near.x), z=far(near.z), directions=(moved,))
    got, *_ = run_scan(kernels, inputs, far(grad_y), grad_last, far(grad_y))
    assert_close(got, expected, TOLERANCE[torch.float32])

    arguments = (direction.A, None, None, reverse, None)  # A as a kernel of 4 taps
    assert_close(
        {"y": kernels.conv.forward(inputs.x, *arguments)}, {"y": kernels.conv.forward(near.x, *arguments)}, 5e-6
    )
    expected = kernels.conv.backward(near.x, *arguments, grad_y, None)
    got = kernels.conv.backward(inputs.x, *arguments, far(grad_y), far(grad_y))
    assert_close({"x": got[0], "weight": got[1]}, {"x": expected[0], "weight": expected[1]}, 5e-6)


class Compiled:
    """Stands for a kernel: compiles it as a launch with these arguments would, and prints what it found."""

    def __init__(self, kernel, capability):
        self.kernel, self.capability = kernel, capability

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps, **kwargs):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        values = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        signature, constants, hints = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            value, free = values.pop(parameter.name), not parameter.do_not_specialize
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = triton.runtime.jit.mangle_type(value)
                aligned = value.data_ptr() % 16 == 0
            elif parameter.is_constexpr or value is None or (value == 1 and free):
                signature[parameter.name], constants[(i,)], aligned = "constexpr", value, False
            else:
                signature[parameter.name] = "i64" if value >= 2**31 else "i32"
                aligned = value % 16 == 0 and free
            if aligned:
                hints[(i,)] = [["tt.divisibility", 16]]
        assert not values, values
        source = ASTSource(self.kernel, signature, constexprs=constants, attrs=hints)
        binary = triton.compile(source, GPUTarget("cuda", self.capability, 32), {"num_warps": num_warps})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            tool = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
            usage = subprocess.run(tool, capture_output=True, text=True).stdout
        print(self.capability, self.kernel.__name__, *re.findall(r"REG:\d+|STACK:\d+", usage))


def compile_kernels(capability, states, with_lengths, reverse):
    """Compile what a scan in bfloat16 launches, and a convolution that is reversed where there are no lengths."""
    kernels, scan, conv = (importlib.import_module(name) for name in MODULES)
    for module, names in ((kernels, ("scan_forward", "scan_backward")), (conv, ("conv_forward", "conv_backward"))):
        for name in names:
            kernel = getattr(module, name)
            setattr(module, name, Compiled(kernel.kernel if isinstance(kernel, Compiled) else kernel, capability))
    lengths = [5] * 4 if with_lengths else None
    inputs = scan_inputs((4, 5, 2304, states), reverse, lengths, dtype=torch.bfloat16)
    out = scan.forward(inputs, True)
    scan.backward(inputs, out.kept, inputs.x, out.last, None)
    weight, bias, state = (draw(shape, torch.bfloat16) for shape in ((2304, 4), (2304,), (4, 3, 2304)))
    arguments = (inputs.x, weight, bias, inputs.lengths, not with_lengths, state if with_lengths else None)
    conv.forward(*arguments)
    conv.backward(*arguments, inputs.x, None)


def test_kernels_compile_for_gpus(tmp_path, root):
    """No GPU is needed for the binary. The interpreter forgives what the compiler does not."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [tuple(line.split()[:2]) for line in done.stdout.splitlines()]
    expected = [("80", way, 1) for way in ("forward", "backward")] + [("90", way, 2) for way in ("forward", "backward")]
    expected = [(capability, f"scan_{way}") for capability, way, directions in expected for _ in range(directions)]
    assert [line for line in compiled if line[1].startswith("scan")] == expected
    assert {("80", "conv_forward"), ("80", "conv_backward"), ("90", "conv_forward"), ("90", "conv_backward")} < set(
        compiled
    )


if __name__ == "__main__":
    compile_kernels(80, 16, False, (True,))
    compile_kernels(90, 24, True, (False, True))
