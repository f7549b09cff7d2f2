"""SSAMBA's configs, folders and the authors' checkpoints, whose model is stated here once more, token by token."""

import dataclasses
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_models_ssamba import SINGLE, SMALL, assert_near, speech

from espnet_mamba.models.ssamba.checkpoints import load_checkpoint, save_checkpoint
from espnet_mamba.models.ssamba.config import config_from_dict, config_to_dict, load_config
from espnet_mamba.models.ssamba.export import export_upstream
from espnet_mamba.models.ssamba.grid import PatchGrid
from espnet_mamba.models.ssamba.model import SsambaModel
from espnet_mamba.models.ssamba.pretraining import SsambaForPretraining
from espnet_mamba.models.ssamba.published import UNUSED, load_published, published_name


def published_state(config, prefix="module."):
    """A state dict as the authors' training saves one, with random values."""
    state = {}
    model = SsambaForPretraining(config)
    for name, tensor in model.state_dict().items():
        theirs, value = published_name(name), torch.randn_like(tensor) * 0.2
        if "A_log" in theirs or "A_b_log" in theirs:
            value = tensor + 0.1 * value
        for _ in range({"v.cls_token": 2, "v.pos_embed": 1, "mask_embed": 2}.get(theirs, 0)):
            value = value[None]
        state[prefix + theirs] = value
    state[prefix + "p_input_fdim"] = torch.tensor(config.num_mel_bins)
    state[prefix + "p_input_tdim"] = torch.tensor(config.num_frames)
    state[prefix + "v.head.weight"] = torch.randn(1000, config.embed_dim)
    state[prefix + "v.head.bias"] = torch.randn(1000)
    return state


def naive_scan(state, key, letter, xz):
    """One direction of one mixer, token by token; xz (L, 2 E)."""
    get = lambda name: state[f"{key}.mixer.{name}"]  # noqa: E731
    x, z = xz.chunk(2, dim=1)
    weight, bias = get(f"conv1d{letter}.weight"), get(f"conv1d{letter}.bias")
    x = F.silu(F.conv1d(F.pad(x.T[None], (weight.shape[2] - 1, 0)), weight, bias, groups=len(weight))[0].T)
    A = -torch.exp(get("A_b_log" if letter else "A_log"))
    rank, states = get(f"dt_proj{letter}.weight").shape[1], A.shape[1]
    dt, B, C = (x @ get(f"x_proj{letter}.weight").T).split([rank, states, states], dim=1)
    dt = F.softplus(dt @ get(f"dt_proj{letter}.weight").T + get(f"dt_proj{letter}.bias"))
    h, rows = torch.zeros_like(A), []
    for t in range(len(x)):
        h = torch.exp(dt[t, :, None] * A) * h + (dt[t] * x[t])[:, None] * B[t]
        rows.append(h @ C[t] + get("D_b" if letter else "D") * x[t])
    return torch.stack(rows) * F.silu(z)


def naive_block(state, key, hidden, residual):
    """Vision Mamba's block: add, norm, mixer; returns the mixer's output and the new residual."""
    residual = hidden if residual is None else residual + hidden
    x = F.layer_norm(residual, residual.shape[-1:], state[f"{key}.norm.weight"], state[f"{key}.norm.bias"])
    xz = x @ state[f"{key}.mixer.in_proj.weight"].T
    y = (naive_scan(state, key, "", xz) + naive_scan(state, key, "_b", xz.flip(0)).flip(0)) / 2
    return y @ state[f"{key}.mixer.out_proj.weight"].T, residual


def naive_published(state, spectrogram, depth):
    """The published encoder on one spectrogram (mel bins, frames), normalised twice."""
    weight, bias = state["v.patch_embed.proj.weight"], state["v.patch_embed.proj.bias"]
    x = F.conv2d(spectrogram[None, None], weight, bias, stride=weight.shape[2:])[0].flatten(1).T
    hidden = torch.cat([state["v.cls_token"][0], x]) + state["v.pos_embed"][0]
    residual = None
    for pair in range(depth // 2):
        back = None if residual is None else residual.flip(0)
        ahead, ahead_residual = naive_block(state, f"v.layers.{2 * pair}", hidden, residual)
        behind, behind_residual = naive_block(state, f"v.layers.{2 * pair + 1}", hidden.flip(0), back)
        hidden, residual = ahead + behind.flip(0), ahead_residual + behind_residual.flip(0)
    x = residual + hidden
    for _ in range(2):
        x = F.layer_norm(x, x.shape[-1:], state["v.norm_f.weight"], state["v.norm_f.bias"])
    return x


def test_published_checkpoint_gives_the_published_output(tmp_path):
    state = published_state(SMALL)
    torch.save(state, tmp_path / "ssamba_test.pth")
    model = load_published(tmp_path / "ssamba_test.pth")
    config = model.encoder.config
    assert (config.name, config.residual, config.final_norm) == ("ssamba_test", "doubled", "twice")
    expected = dataclasses.replace(SMALL, name="ssamba_test", final_norm="twice", dt_bias_backward="zero")
    assert config == dataclasses.replace(expected, mask_patches=5, drop_path=0.1)
    spectrogram = torch.randn(32, 64)
    expected = naive_published({key.removeprefix("module."): value for key, value in state.items()}, spectrogram, 4)
    with torch.no_grad():
        output = model.encoder.encode(spectrogram[None], PatchGrid([4], 2)).output
        assert_near(model.encoder.final_norm(output)[0], expected, 2e-5)
    head = model.classification_head[2].weight
    assert torch.equal(head, state["module.cpredlayer.2.weight"])
    assert torch.equal(model.reconstruction_head[0].bias, state["module.gpredlayer.0.bias"])


def test_published_keys_that_do_not_fit_are_named(tmp_path):
    def refuse(change, match, **overrides):
        state = published_state(SMALL, prefix="")  # DataParallel's prefix may be gone
        change(state)
        torch.save(state, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=match):
            load_published(tmp_path / "x.pth", **overrides)

    refuse(lambda s: s.pop("v.layers.1.norm.bias"), r"missing v\.layers\.1\.norm\.bias \(16,\)")  # RMSNorm's
    refuse(lambda s: s.update({"v.dist_token": torch.zeros(1, 1, 16)}), r"unknown v\.dist_token \(1, 1, 16\)")
    refuse(lambda s: s.update(mask_embed=torch.zeros(1, 1, 8)), r"mask_embed is \(8,\), expected \(16,\)")
    refuse(lambda s: None, r"v\.pos_embed is \(9, 16\), expected \(17, 16\)", num_frames=128, mask_patches=4)
    refuse(lambda s: s.pop("p_input_fdim"), "not a checkpoint of SSAMBA's authors: p_input_fdim missing")
    refuse(lambda s: s.update(p_input_tdim="64"), "not a state dict")
    for key in UNUSED:
        state = published_state(SMALL)
        del state["module." + key]  # the unused head may be missing
        torch.save(state, tmp_path / "x.pth")
        load_published(tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_published(tmp_path / "none.pth")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_would_run_code_is_refused(tmp_path):
    state = published_state(SMALL) | {"module.extra": Hostile(tmp_path / "owned")}
    torch.save(state, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match="refused: not a file of plain tensors"):
        load_published(tmp_path / "hostile.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Hostile(tmp_path / "owned"), protocol=2))
    with pytest.raises(ValueError, match="refused"):
        load_published(tmp_path / "plain.pth")
    assert not (tmp_path / "owned").exists()
    pickle.loads((tmp_path / "plain.pth").read_bytes()).close()
    assert (tmp_path / "owned").exists()  # the trap works where it is not refused


@pytest.mark.parametrize(("size", "millions"), [("tiny", (7.1, 7.3)), ("small", (25.8, 26.2)), ("base", (98.3, 99.0))])
def test_sizes_are_the_papers(root, size, millions):
    config = load_config(root / f"conf/ssamba/ssamba_{size}.yaml")
    assert config.residual == "doubled" and config.depth == 24 and config.num_patches == 512
    with torch.device("meta"):
        model = SsambaForPretraining(config)
    count = sum(p.numel() for p in model.parameters())
    unused_head = 1000 * (config.embed_dim + 1)
    assert (round(count / 1e6, 1), round((count + unused_head) / 1e6, 1)) == millions


def test_mini_gives_thirteen_states_as_deep_models_do(root):
    config = load_config(root / "conf/ssamba/ssamba_mini.yaml")
    assert config.residual == "single"
    deep = SsambaModel(dataclasses.replace(config, depth=24, embed_dim=16)).eval()
    states, _ = deep.extract_features(speech(5000)[None], frames="mean")
    assert len(states) == 13 and states[0].shape == (1, 2, 16) and deep.config.downsample_rate == 2560


def test_config_errors_name_the_nearest_and_the_limit(tmp_path, root):
    assert config_from_dict(config_to_dict(SMALL), "here") == SMALL
    wrong = [({"residul": "single"}, "unknown key 'residul'; did you mean 'residual'")]
    wrong += [({"residual": "twice"}, "'twice' is not one of: doubled single"), ({"depth": 3}, "depth is 3, expected")]
    wrong += [({"num_frames": 100}, "num_frames is 100, expected whole patches of 16")]
    wrong += [({"mask_patches": 513}, "mask_patches is 513 of only 512"), ({"embed_dim": 0}, "embed_dim is 0")]
    wrong += [({"mask_squares": [5, 3]}, "mask_squares is"), ({"mask_passes": 3}, "mask_passes is 3")]
    for values, message in wrong:
        with pytest.raises(ValueError, match=message):
            config_from_dict(values, "x.yaml")
    with pytest.raises(FileNotFoundError, match="did you mean 'ssamba_tiny'"):
        load_config(root / "conf/ssamba/ssamba_tini.yaml")
    (tmp_path / "h.yaml").write_text("embed_dim: 16\n")
    with pytest.raises(ValueError, match="lacks the line 'kind: ssamba'"):
        load_config(tmp_path / "h.yaml")


def test_checkpoint_round_trip_and_misfits(tmp_path):
    model = SsambaModel(SINGLE).eval()
    save_checkpoint(model, tmp_path / "m")
    save_checkpoint(model, tmp_path / "m")  # over what is there
    wav = speech(5000)[None]
    assert torch.equal(model(wav).output, load_checkpoint(tmp_path / "m")(wav).output)
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((tmp_path / "m/config.json").read_text())
    misfits = [({"depth": 6}, r"missing blocks\.4\..*in all"), ({"format": "other"}, "another kind of model")]
    misfits += [({"embed_dim": 32, "depth": 4}, r"class_token is \(16,\), expected \(32,\)")]
    for change, message in misfits:
        (tmp_path / "m/config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path / "m")
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    (tmp_path / "m/model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="not readable"):
        load_checkpoint(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match="no model folder"):
        load_checkpoint(tmp_path)


def test_export_writes_the_model_and_its_random_control(tmp_path):
    save_checkpoint(SsambaModel(SINGLE), tmp_path / "run/valid.loss.best")
    row = {"step": 5, "split": "valid", "loss": 3.0, "loss_info_nce": 2.0, "loss_mse": 0.1, "accuracy_masked": 0.25}
    (tmp_path / "run/train_log.jsonl").write_text(json.dumps(row) + "\n")
    model = export_upstream(tmp_path / "run/valid.loss.best", tmp_path / "up", tmp_path / "random", seed=1)
    card = (tmp_path / "up/README.md").read_text()
    assert "accuracy on masked patches 0.2500" in card and "every 160 ms" in card
    control = load_checkpoint(tmp_path / "random")
    assert control.config == model.config
    assert not torch.equal(control.blocks[0].mixer.in_proj.weight, model.blocks[0].mixer.in_proj.weight)
