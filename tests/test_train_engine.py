"""The training step itself: what is recomputed, compiled, kept in float32; how often the host waits for a device."""

import dataclasses
import math
import shutil

import pytest
import torch
from test_models_hubert import TINY
from test_train import corpus, train  # noqa: F401 -- corpus is a fixture
from torch.overrides import TorchFunctionMode

from espnet_mamba.layers.mamba import Mamba
from espnet_mamba.layers.packing import pack_waveforms
from espnet_mamba.models import pretraining
from espnet_mamba.models.pretraining import HubertForPretraining
from espnet_mamba.models.ssamba.config import SsambaConfig
from espnet_mamba.models.ssamba.pretraining import SsambaForPretraining

DROPPY = dataclasses.replace(TINY, num_layers=4, dropout=0.2, layer_drop=0.3)
CONFIGS = {
    "extbimamba": DROPPY,
    "attention": dataclasses.replace(DROPPY, mixer="attention", num_heads=2, attention_dropout=0.2, ffn_dim=24),
    "macaron": dataclasses.replace(DROPPY, block="macaron", ffn_dim=24, conv_module_kernel=3),
}
SSAMBA = SsambaConfig(embed_dim=16, depth=4, state_size=4, num_mel_bins=32, num_frames=64, mask_patches=4)


def batch(kind, num_utterances=2):
    """Crops, a padded batch, or a packed row, of 21 and 11 frames in turns; lengths stay with the host."""
    lengths = ([6800] if kind == "crops" else [6800, 3600]) * num_utterances
    wavs = [torch.randn(length) * 0.1 for length in lengths[:num_utterances]]
    frames = [(len(wav) - 400) // 320 + 1 for wav in wavs]
    num_samples = torch.tensor([len(wav) for wav in wavs])
    if kind == "packed":
        values = {"speech": pack_waveforms(wavs, 320), "labels": torch.randint(0, 7, (1, sum(frames)))}
        return values | {"num_samples": num_samples}
    speech = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
    values = {"speech": speech, "labels": torch.randint(0, 7, (num_utterances, max(frames)))}
    return values | ({"num_samples": num_samples} if kind == "padded" else {})


def one_step(model, values, amp=False):
    """Return the loss, all gradients and all buffers of a batch under seed 2."""
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        sums = model(**values)
    (sums[0] + sums.feature_penalty).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return sums[0].detach(), gradients, dict(model.named_buffers())


def assert_same(one, other):
    assert torch.equal(one[0], other[0])
    for mine, theirs in zip(one[1:], other[1:], strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert torch.equal(mine[name], theirs[name]), name


# --- activation checkpointing and torch.compile ---


@pytest.mark.parametrize("kind", ["crops", "padded", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_computed_twice_have_the_same_gradients(name, kind):
    """Bit by bit: dropout, dropped layers, running statistics; and each block that is not dropped ran twice."""
    from espnet_mamba.train.module_options import checkpoint_blocks

    values, results, calls = batch(kind), [], []
    for twice in (False, True):
        torch.manual_seed(1)
        model = HubertForPretraining(CONFIGS[name], 7)
        names = list(model.state_dict())
        if twice:
            assert checkpoint_blocks(model) == 4
            for block in model.hubert.blocks:
                block.mixer.register_forward_hook(lambda *_: calls.append(1))
        results.append(one_step(model, values, amp=kind == "packed"))
        assert list(model.state_dict()) == names
    assert_same(*results)
    dropped = 4 - len({n.split(".")[2] for n in results[0][1] if n.startswith("hubert.blocks.")})
    assert len(calls) == 2 * (4 - dropped) and dropped < 4
    model.eval()
    with torch.no_grad():
        model(**values)
    assert len(calls) == 2 * (4 - dropped) + 4, "without gradients nothing is computed twice"


def test_kernels_checked_in_a_block_that_is_computed_twice_pass(monkeypatch):
    """The check, on first use, has a backward pass of its own, in the middle of the block's first one."""
    from espnet_mamba.ops.causal_conv1d.backends import SELECTOR as CONV_SELECTOR
    from espnet_mamba.ops.selective_scan.backends import SELECTOR, unavailable
    from espnet_mamba.train.module_options import checkpoint_blocks

    if unavailable("cpu"):
        pytest.skip(f"no kernels to check: {unavailable('cpu')}")
    values, results = batch("crops"), []
    for twice in (False, True):
        torch.manual_seed(1)
        model = HubertForPretraining(CONFIGS["extbimamba"], 7)
        if twice:
            checkpoint_blocks(model)
            for selector in (SELECTOR, CONV_SELECTOR):
                monkeypatch.setattr(selector, "passed", {})
        results.append(one_step(model, values))
    assert_same(*results)
    for selector in (SELECTOR, CONV_SELECTOR):
        assert selector.passed and all(selector.passed.values()), selector.passed


def test_a_second_backward_pass_computes_blocks_again():
    from espnet_mamba.train.module_options import checkpoint_blocks

    model, values = HubertForPretraining(CONFIGS["macaron"], 7), batch("crops")
    checkpoint_blocks(model)
    loss = model(**values).loss_sum
    weights = [p for name, p in model.named_parameters() if name.endswith("classes")] + [model.hubert.mask_embedding]
    one = torch.autograd.grad(loss, weights, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(one, torch.autograd.grad(loss, weights), strict=True))


def test_ssamba_is_computed_twice_too():
    from espnet_mamba.train.module_options import checkpoint_blocks

    results = []
    for twice in (False, True):
        torch.manual_seed(1)
        model = SsambaForPretraining(SSAMBA)
        if twice:
            checkpoint_blocks(model)
        torch.manual_seed(2)
        sums = model(torch.sin(torch.arange(8000.0) / 9)[None].repeat(2, 1))
        (sums.info_nce_sum + sums.mse).backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.fixture
def one_process(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("no torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_blocks_computed_twice_under_ddp(one_process):
    from espnet_mamba.train.module_options import checkpoint_blocks

    values, results = batch("packed"), []
    for twice in (False, True):
        torch.manual_seed(1)
        model = HubertForPretraining(CONFIGS["macaron"], 7)
        if twice:
            checkpoint_blocks(model)
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        results.append(one_step(wrapped, values))
    assert_same(*results)


@pytest.mark.parametrize("mixer", ["mamba", "attention"])
def test_compiled_parts_give_the_same_loss(mixer):
    """Traced by the compiler's front half, which needs no C++ compiler; a scan is called as it is."""
    from espnet_mamba.train.module_options import apply_module_options, compile_parts

    torch._dynamo.reset()
    config = dataclasses.replace(TINY, mixer=mixer, num_heads=2, ffn_dim=24, dropout=0.0, dropout_input=0.0)
    config = dataclasses.replace(config, layer_drop=0.0, attention_dropout=0.0)
    values, results = batch("crops"), []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = HubertForPretraining(config, 7)
        names = list(model.state_dict())
        if compiled:
            parts = compile_parts(model, backend="aot_eager")
            assert parts == ["hubert.blocks.0", "hubert.blocks.1", "hubert.front_end"]
            apply_module_options(model, True, False)  # recomputed as well: a compiled block twice
        results.append(one_step(model, values))
        assert list(model.state_dict()) == names, "checkpoints of runs with and without are the same"
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_by_the_machines_own_compiler():
    from espnet_mamba.train.module_options import compile_parts

    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler, and there is none")
    torch._dynamo.reset()
    config = dataclasses.replace(TINY, mixer="mamba", num_layers=1, dropout=0.0, dropout_input=0.0, layer_drop=0.0)
    model, values = HubertForPretraining(config, 7), batch("crops")
    plain, gradients, _ = one_step(model, values)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    model.zero_grad()
    compile_parts(model)
    loss, again, _ = one_step(model, values)
    torch.testing.assert_close(loss, plain)
    for name in gradients:
        torch.testing.assert_close(again[name], gradients[name], rtol=1e-4, atol=1e-5)


# --- types ---


@pytest.mark.parametrize("mixer", ["mamba", "extbimamba", "innbimamba"])
def test_bfloat16_leaves_rates_steps_and_states_in_float32(mixer, monkeypatch):
    from espnet_mamba.ops import mamba_inner

    seen, forward_parts = [], mamba_inner._forward_parts

    def watched(*args):
        parts = forward_parts(*args)
        seen.extend(parts.scan.directions)
        return parts

    monkeypatch.setattr(mamba_inner, "_forward_parts", watched)
    model = HubertForPretraining(dataclasses.replace(TINY, mixer=mixer, layer_drop=0.0), 7)
    _, gradients, _ = one_step(model, batch("crops"), amp=True)
    assert seen and all(v.dtype == torch.float32 for d in seen for v in (d.A, d.D_skip, d.dt_bias))
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    if mixer == "mamba":
        layer = model.hubert.blocks[0].mixer
        with torch.autocast("cpu", torch.bfloat16):
            _, state = layer(torch.randn(1, 5, 16), state=layer.start_state(1))
        assert state.scan.dtype == torch.float32


@pytest.mark.espnet
def test_bfloat16_trains_without_a_scaler(corpus, root, tmp_path, monkeypatch):  # noqa: F811
    def refuse(*_args, **_kwargs):
        raise AssertionError("a GradScaler was made")

    for place in (torch.amp, torch.cuda.amp, torch.cpu.amp):
        monkeypatch.setattr(place, "GradScaler", refuse)
    rows = train(corpus, tmp_path / "a", root, "--max_steps", 4, "--log_interval", 1, "--use_amp", "true")
    assert all(math.isfinite(row[2]) for row in rows) and rows[3][2] < rows[0][2]
    state = torch.load(tmp_path / "a/checkpoint.pth", weights_only=True)
    moments = [value for entry in state["optimizer"]["state"].values() for value in entry.values()]
    assert {value.dtype for value in [*state["model"].values(), *moments]} == {torch.float32}
    with pytest.raises(ValueError, match="--train_dtype float16: weights stay in float32; give --use_amp true"):
        train(corpus, tmp_path / "b", root, "--train_dtype", "float16")


# --- waiting for the device ---

READS = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "masked_select", "cpu", "numpy"}


class Reads(TorchFunctionMode):
    """Counts what would make the host wait for a GPU: values read, and indexing by a mask, whose size is a value."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        places = args[1] if name in ("__getitem__", "__setitem__") else ()
        places = places if isinstance(places, tuple) else (places,)
        if name in READS or any(isinstance(v, torch.Tensor) and v.dtype == torch.bool for v in places):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def reads(config, kind, num_utterances):
    from espnet_mamba.train.espnet_model import ESPnetHubertModel
    from espnet_mamba.train.meters import LossMeter

    model = ESPnetHubertModel(HubertForPretraining(config, 7))
    values = batch(kind, num_utterances)
    with Reads() as count:
        sums = model.sums(**values)
        (model.loss(sums) * sums.num_masked).backward()
        LossMeter().add(sums, 100)
    return sorted(count.names)


@pytest.mark.parametrize("mixer", ["mamba", "attention", "extbimamba"])
def test_the_host_waits_once_per_batch_whatever_its_size(mixer):
    config = dataclasses.replace(TINY, mixer=mixer, num_heads=2, layer_drop=0.0)
    reads(config, "crops", 2)  # the first call checks the kernels
    assert reads(config, "crops", 2) == reads(config, "crops", 8) == ["tolist"], "the number of masked frames"
    # lengths, on the host anyway, are read as well: as often for two utterances as for eight
    assert reads(config, "packed", 2) == reads(config, "packed", 8)
    assert reads(config, "padded", 2) == reads(config, "padded", 8)


@pytest.mark.espnet
def test_an_update_waits_once_per_batch_and_once_for_the_norm(corpus, root, tmp_path, monkeypatch):  # noqa: F811
    from espnet_mamba.train.trainer import TrainingRun

    update, counts = TrainingRun._update, []

    def counted(self, *args):
        with Reads() as count:
            norm = update(self, *args)
        counts.append(sorted(count.names))
        return norm

    monkeypatch.setattr(TrainingRun, "_update", counted)
    options = ("--max_steps", 3, "--accum_grad", 2, "--model_conf", "layer_drop=0", "--peak_tflops", 1)
    train(corpus, tmp_path / "u", root, *options)
    assert counts[1:] == [["__float__", "tolist", "tolist"]] * 2, "the first may check the kernels"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, whose waits PyTorch would report")
@pytest.mark.parametrize("kind", ["crops", "padded", "packed"])
def test_a_gpu_is_waited_for_once(kind, recwarn):
    config = dataclasses.replace(TINY, layer_drop=0.0)
    model = HubertForPretraining(config, 7).cuda()
    values = {name: v if name == "num_samples" else v.cuda() for name, v in batch(kind, 6).items()}
    for _ in range(2):  # the first pass loads and checks kernels
        recwarn.clear()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            sums = model(**values)
            sums.loss_sum.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in recwarn if "synchronizing" in str(w.message)]
    assert len(waits) == 1, [str(w.message) for w in waits]


def test_only_masked_frames_have_logits_with_gradients(monkeypatch):
    monkeypatch.setattr(pretraining, "UNMASKED_AT_ONCE", 3)
    model, values = HubertForPretraining(dataclasses.replace(TINY, layer_drop=0.0), 7).eval(), batch("crops", 4)
    calls = []
    model.head.register_forward_hook(lambda _m, _i, logits: calls.append((len(logits), logits.requires_grad)))
    sums = model(**values, generator=torch.Generator().manual_seed(3))
    masked, seen = int(sums.num_masked), int(sums.num_unmasked)
    assert masked + seen == 4 * 21 and calls[0] == (masked, True)
    assert [grad for _, grad in calls[1:]] == [False] * math.ceil(seen / 3) and max(n for n, _ in calls[1:]) == 3
    monkeypatch.setattr(pretraining, "UNMASKED_AT_ONCE", 4096)
    whole = model(**values, generator=torch.Generator().manual_seed(3))
    assert whole.correct_unmasked == sums.correct_unmasked


def test_a_packed_row_of_one_utterance_with_a_frame_more_in_its_slot():
    """9000 samples have 27 frames; its slot of 9280 has room for 28."""
    model = HubertForPretraining(TINY, 7).eval()
    wav, labels = torch.randn(9000) * 0.1, torch.randint(0, 7, (1, 27))
    packed = model(pack_waveforms([wav], 320), labels, torch.tensor([9000]), torch.Generator().manual_seed(3))
    alone = model(wav[None], labels, None, torch.Generator().manual_seed(3))
    for one, other in zip(packed, alone, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="labels have 26 frames, the packed audio has 27"):
        model(pack_waveforms([wav], 320), labels[:, :26], torch.tensor([9000]))


# --- what the benchmark compares with ---


def test_the_benchmarks_reference_scan_computes_what_our_layer_does(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    from train_candidates import PlainMamba, reference_scan

    mixer, x = Mamba(16, state_size=4), torch.randn(2, 13, 16, requires_grad=True)
    results = []
    for layer in (mixer, PlainMamba(mixer, reference_scan()[0])):
        y = layer(x)[0]
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
