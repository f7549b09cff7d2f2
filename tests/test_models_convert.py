"""Checkpoints in and out. What a converted Transformer computes is compared in test_models_parity.py as well."""

import argparse
import json
import sys
import types

import pytest
import torch

from espnet_mamba.bin import convert_checkpoint
from espnet_mamba.bin.cli import run_main
from espnet_mamba.models.checkpoints import load_checkpoint, save_checkpoint
from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.convert import convert
from espnet_mamba.models.convert.fairseq import parse_conv_layers
from espnet_mamba.models.convert.head import load_head
from espnet_mamba.models.hubert import HubertModel

WIDTH, INNER, STATES, LAYERS = 48, 96, 5, 2
CONVS = [(8, 10, 5)] + [(8, 3, 2)] * 4 + [(8, 2, 2)] * 2
SETTINGS = {
    "encoder_attention_heads": 4,
    "dropout": 0.2,
    "layer_norm_first": False,
    "causal_attn": True,
    "activation_fn": "gelu",
    "conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 4 + [(8,2,2)] * 2",
}


def linear(name, outer, inner):
    return {f"{name}.weight": torch.randn(outer, inner) * 0.1, f"{name}.bias": torch.randn(outer) * 0.1}


def norm(name, width):
    return {f"{name}.weight": 1 + 0.1 * torch.randn(width), f"{name}.bias": 0.1 * torch.randn(width)}


def mamba(name):
    return {
        f"{name}.in_proj.weight": torch.randn(2 * INNER, WIDTH),
        f"{name}.conv1d.weight": torch.randn(INNER, 1, 4),
        f"{name}.conv1d.bias": torch.randn(INNER),
        f"{name}.x_proj.weight": torch.randn(3 + 2 * STATES, INNER),
        **linear(f"{name}.dt_proj", INNER, 3),
        f"{name}.A_log": torch.randn(INNER, STATES),
        f"{name}.D": torch.randn(INNER),
        f"{name}.out_proj.weight": torch.randn(WIDTH, INNER),
    }


def mamba2(name):
    return {
        f"{name}.in_proj.weight": torch.randn(2 * INNER + 2 * STATES + 6, WIDTH),
        f"{name}.conv1d.weight": torch.randn(INNER + 2 * STATES, 1, 4),
        f"{name}.conv1d.bias": torch.randn(INNER + 2 * STATES),
        **{f"{name}.{part}": torch.randn(6) for part in ("dt_bias", "A_log", "D")},
        f"{name}.norm.weight": torch.randn(INNER),
        f"{name}.out_proj.weight": torch.randn(WIDTH, INNER),
    }


def fairseq_state(mixer="attention", ffn=64, classes=104):
    """Random tensors by the names of fairseq's hubert.py, and of wav2vec2.py of paper 2's public code."""
    state = {
        f"feature_extractor.conv_layers.{i}.0.weight": torch.randn(8, 8 if i else 1, CONVS[i][1]) for i in range(7)
    }
    state |= (
        norm("feature_extractor.conv_layers.0.2", 8) | norm("layer_norm", 8) | linear("post_extract_proj", WIDTH, 8)
    )
    state |= {"mask_emb": torch.rand(WIDTH), "encoder.pos_conv.0.bias": torch.randn(WIDTH)}
    state |= {
        "encoder.pos_conv.0.weight_g": torch.rand(1, 1, 16),
        "encoder.pos_conv.0.weight_v": torch.randn(WIDTH, 3, 16),
    }
    state |= norm("encoder.layer_norm", WIDTH)
    for i in range(LAYERS):
        layer = f"encoder.layers.{i}."
        if mixer == "attention":
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                state |= linear(f"{layer}self_attn.{part}", WIDTH, WIDTH)
            state |= norm(layer + "self_attn_layer_norm", WIDTH)
        elif mixer == "extbimamba":
            state |= mamba(layer + "mamba") | mamba(layer + "mamba_rev") | norm(layer + "bimamba_layer_norm", WIDTH)
        else:
            state |= (mamba2 if mixer == "mamba2" else mamba)(layer + "mamba") | norm(layer + "mamba_layer_norm", WIDTH)
        if ffn:
            state |= linear(layer + "fc1", ffn, WIDTH) | linear(layer + "fc2", WIDTH, ffn)
            state |= norm(layer + "final_layer_norm", WIDTH)
    return state | linear("final_proj", 256, WIDTH) | {"label_embs_concat": torch.rand(classes, 256)}


def save(path, state, **more):
    torch.save({"model": state, **more}, path)
    return path


def convert_refused(source, out_dir, match, **options):
    with pytest.raises((ValueError, FileNotFoundError), match=match) as error:
        convert(source, out_dir, **options)
    assert "\n" not in str(error.value) and not out_dir.exists()
    return str(error.value)


def test_fairseq_equals_torchaudios_own_importer(tmp_path):
    importer = pytest.importorskip("torchaudio.models.wav2vec2.utils.import_fairseq")
    from torchaudio.models import wav2vec2_model

    state = fairseq_state()
    settings = {"_name": "hubert", **SETTINGS, "causal_attn": False, "encoder_attention_heads": 12}
    result = convert(save(tmp_path / "it1.pt", state, cfg={"model": settings}), tmp_path / "ours")
    assert (result.kind, result.num_tensors, result.has_head) == ("fairseq HuBERT", len(state), True)
    assert not result.dropped and not result.notes and result.config.name == "ours"
    theirs = wav2vec2_model(
        "group_norm", CONVS, False, WIDTH, 0, 16, 16, LAYERS, 12, 0, 64, 0, 0, False, 0, None
    ).eval()
    heads = ("mask_emb", "final_proj", "label_embs")
    theirs.load_state_dict(importer._convert_state_dict({k: v for k, v in state.items() if not k.startswith(heads)}))
    wavs = torch.randn(2, 8000) * 0.1
    with torch.no_grad():
        ours, expected = load_checkpoint(tmp_path / "ours")(wavs).hidden_states, theirs.extract_features(wavs)[0]
    for mine, other in zip(ours[1:], expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


def test_head_is_kept_beside_the_model(tmp_path):
    state = fairseq_state()
    convert(save(tmp_path / "a.pt", state, cfg={"model": SETTINGS}), tmp_path / "ours")
    head = load_head(tmp_path / "ours")
    assert torch.equal(head.classes, state["label_embs_concat"])
    hidden = torch.randn(3, WIDTH)
    query = torch.nn.functional.linear(hidden, state["final_proj.weight"], state["final_proj.bias"])
    expected = torch.cosine_similarity(query[:, None], state["label_embs_concat"][None], dim=-1) / 0.1
    torch.testing.assert_close(head(hidden), expected)
    assert torch.equal(load_checkpoint(tmp_path / "ours").mask_embedding, state["mask_emb"])
    assert convert(tmp_path / "ours", tmp_path / "copy").has_head and load_head(tmp_path / "copy") is not None
    two_label_sets = state | linear("final_proj", 512, WIDTH)
    result = convert(save(tmp_path / "b.pt", two_label_sets, cfg={"model": SETTINGS}), tmp_path / "ours")
    assert set(result.dropped) == {"final_proj.weight", "final_proj.bias", "label_embs_concat"}
    assert load_head(tmp_path / "ours") is None and "left out: `final_proj.weight`" in (
        tmp_path / "ours/README.md"
    ).read_text(encoding="utf-8")


@pytest.mark.parametrize("form", ["dict", "namespace", "omegaconf", "s3prl"])
def test_settings_are_read_in_every_form_without_their_classes(tmp_path, form, monkeypatch):
    module, ran = types.ModuleType("fairseq.data.dictionary"), []
    module.Dictionary = type(
        "Dictionary", (), {"__module__": module.__name__, "__setstate__": lambda *_: ran.append(1)}
    )
    for name in ("fairseq", "fairseq.data", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    dictionary = module.Dictionary()
    dictionary.symbols = ["<s>", "0"]
    more = {"task_state": {"dictionaries": [dictionary]}}  # as in every published HuBERT
    if form == "dict":
        more["cfg"] = {"model": SETTINGS}
    elif form == "namespace":
        more |= {"cfg": None, "args": argparse.Namespace(**SETTINGS)}
    elif form == "omegaconf":
        more["cfg"] = pytest.importorskip("omegaconf").OmegaConf.create({"model": SETTINGS})
    path = tmp_path / "a.pt"
    if form == "s3prl":
        torch.save({"model_weight": fairseq_state(), "model_cfg": SETTINGS, "task_cfg": {}, **more}, path)
    else:
        save(path, fairseq_state(), **more)
    result = convert(path, tmp_path / "ours")
    assert (result.config.mixer, result.config.num_heads, result.config.dropout) == ("causal_attention", 4, 0.2)
    assert not result.notes and not ran and ("S3PRL" in result.kind) == (form == "s3prl")


def test_shapes_suffice_without_settings(tmp_path):
    result = convert(save(tmp_path / "a.pt", fairseq_state()), tmp_path / "ours")
    expected = {"embed_dim": WIDTH, "num_layers": LAYERS, "ffn_dim": 64, "position_kernel": 16, "position_groups": 16}
    assert {name: getattr(result.config, name) for name in expected} == expected
    assert [note.split(":")[0] for note in result.notes] == ["mixer", "num_heads"]


@pytest.mark.parametrize("ffn", [0, 64])
@pytest.mark.parametrize("mixer", ["mamba", "extbimamba", "mamba2"])
def test_paper_2s_mamba_models(tmp_path, mixer, ffn):
    state = fairseq_state(mixer, ffn, classes=504)
    halves = {name: tensor.half() for name, tensor in state.items()}
    result = convert(save(tmp_path / "a.pt", halves), tmp_path / "ours")
    config = result.config
    assert (config.mixer, config.ffn_dim, config.state_size, config.conv_kernel, config.expand) == (
        mixer,
        ffn,
        STATES,
        4,
        2,
    )
    assert result.num_tensors == len(state) and not result.dropped and not result.notes
    assert mixer != "mamba2" or config.head_dim == INNER // 6
    ours = load_checkpoint(tmp_path / "ours")
    parts = {"mamba": "mixer.forward_mamba", "mamba_rev": "mixer.backward_mamba"} if mixer == "extbimamba" else {}
    for name, tensor in halves.items():
        if name.startswith("encoder.layers.1.") and ".mamba" in name:
            _, part, rest = name.removeprefix("encoder.layers.").split(".", 2)
            part = "mixer_norm" if part.endswith("norm") else parts.get(part, "mixer")
            assert torch.equal(ours.get_parameter(f"blocks.1.{part}.{rest}"), tensor.float()), name
    assert ours(torch.randn(1, 4000)).hidden_states[-1].isfinite().all()


def test_misfits_name_key_and_shapes(tmp_path):
    path, out = tmp_path / "a.pt", tmp_path / "ours"
    state, cfg = fairseq_state(), {"model": SETTINGS}
    key = "encoder.layers.1.fc1.weight"
    save(path, state | {key: torch.zeros(32, WIDTH)}, cfg=cfg)
    convert_refused(path, out, rf"{key} is \(32, 48\), expected \(64, 48\) \(1 in all\)")
    save(path, state | {"encoder.layers.0.adapter.weight": torch.zeros(3)}, cfg=cfg)
    convert_refused(path, out, r"no place in our model for encoder.layers.0.adapter.weight \(3,\)")
    save(path, {name: tensor for name, tensor in state.items() if name != key}, cfg=cfg)
    convert_refused(path, out, r"missing: blocks.1.ffn.up.weight \(64, 48\)")
    save(path, {name: tensor for name, tensor in state.items() if name != "encoder.layer_norm.weight"}, cfg=cfg)
    convert_refused(path, out, "no tensor for encoder_norm.weight")
    save(path, state | {"mask_emb": 3.0}, cfg=cfg)
    convert_refused(path, out, "mask_emb is a float")
    save(path, state, cfg=cfg)
    other = HubertConfig(name="other", mixer="mamba", embed_dim=WIDTH, num_layers=LAYERS, conv_layers=tuple(CONVS))
    convert_refused(path, out, r"self_attn.q_proj.weight \(48, 48\) has no place in other \(mamba\)", config=other)


def test_what_our_model_has_not_is_refused(tmp_path):
    path, out, state = tmp_path / "a.pt", tmp_path / "ours", fairseq_state()
    convert_refused(save(path, state, cfg={"model": SETTINGS | {"layer_norm_first": True}}), out, "layer_norm_first")
    convert_refused(
        save(path, state, cfg={"model": SETTINGS | {"activation_fn": "relu"}}), out, "activation_fn: 'relu'"
    )
    text = "__import__('os').system('true')"
    convert_refused(
        save(path, state, cfg={"model": SETTINGS | {"conv_feature_layers": text}}), out, "not a list of layers"
    )
    assert parse_conv_layers(SETTINGS["conv_feature_layers"], "here") == CONVS
    state["feature_extractor.conv_layers.1.0.weight"] = torch.randn(8, 8, 5)
    convert_refused(save(path, state), out, "strides of a front end with kernels .10, 5, 3")
    layer_norm = fairseq_state()
    layer_norm["feature_extractor.conv_layers.0.2.1.weight"] = layer_norm.pop(
        "feature_extractor.conv_layers.0.2.weight"
    )
    convert_refused(save(path, layer_norm), out, "often means layer_norm_first")


def test_unknown_kinds_are_named(tmp_path):
    out = tmp_path / "ours"
    convert_refused(tmp_path / "none.pt", out, "no such file")
    (tmp_path / "noise.pt").write_bytes(bytes(range(256)))
    convert_refused(tmp_path / "noise.pt", out, "noise.pt: not a file of torch.save")
    (tmp_path / "noise.safetensors").write_bytes(bytes(range(256)))
    convert_refused(tmp_path / "noise.safetensors", out, "not readable")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    convert_refused(tmp_path / "list.pt", out, "holds a list, not a dictionary")
    torch.save({"bert.weight": torch.zeros(2)}, tmp_path / "bert.pt")
    convert_refused(tmp_path / "bert.pt", out, "not a HuBERT of .* it begins with: bert.weight")
    (tmp_path / "folder").mkdir()
    convert_refused(tmp_path / "folder", out, "no config.json")
    (tmp_path / "folder/config.json").write_text('{"model_type": "wav2vec2"}')
    convert_refused(tmp_path / "folder", out, "model_type 'wav2vec2': this kind of model cannot be converted")
    (tmp_path / "folder/config.json").write_text('{"model_type": "hubert"}')
    convert_refused(tmp_path / "folder", out, "neither model.safetensors nor pytorch_model.bin")


def test_nothing_but_a_model_folder_is_replaced(tmp_path):
    path = save(tmp_path / "a.pt", fairseq_state(), cfg={"model": SETTINGS})
    (tmp_path / "mine").mkdir()
    convert(path, tmp_path / "mine")
    convert(path, tmp_path / "mine")
    (tmp_path / "mine/config.json").write_text('{"name": "a web page"}')
    with pytest.raises(ValueError, match="no model folder that could be replaced"):
        convert(path, tmp_path / "mine")
    with pytest.raises(ValueError, match="holds the source"):
        convert(path, tmp_path)
    assert path.exists() and (tmp_path / "mine/config.json").read_text().startswith('{"name"')
    with pytest.raises(ValueError, match="to: 'onnx' is not one of: espnet_mamba hf"):
        convert(path, tmp_path / "new", to="onnx")


OURS = HubertConfig("t", conv_layers=tuple(CONVS), embed_dim=WIDTH, num_layers=LAYERS, mixer="attention", ffn_dim=64)


@pytest.mark.parametrize("front_end", ["conv_group", "conv_layer"])
def test_transformers_loads_what_we_export_and_back(tmp_path, front_end):
    transformers = pytest.importorskip("transformers")
    config = HubertConfig(**{**vars(OURS), "front_end": front_end, "num_heads": 4, "layer_drop": 0.3})
    ours = HubertModel(config).eval()
    save_checkpoint(ours, tmp_path / "t")
    convert(tmp_path / "t", tmp_path / "hf", to="hf")
    theirs, info = transformers.HubertModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "hf")
    wavs = torch.randn(1, 8000) * 0.1
    values = extractor(wavs[0].numpy(), sampling_rate=16000, return_tensors="pt").input_values
    with torch.no_grad():
        expected = theirs.eval()(values, output_hidden_states=True).hidden_states
        for mine, other in zip(ours(wavs).hidden_states, expected, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    convert(tmp_path / "hf", tmp_path / "back/t")
    again = load_checkpoint(tmp_path / "back/t")
    assert again.config == HubertConfig(**{**vars(config), "name": "t"})
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_export_to_transformers_names_the_head_it_leaves_out(tmp_path):
    settings = SETTINGS | {"causal_attn": False}
    path = save(tmp_path / "a.pt", fairseq_state(), cfg={"model": settings})
    result = convert(path, tmp_path / "hf", to="hf")
    assert result.dropped == ("head.classes", "head.projection.bias", "head.projection.weight")
    assert not result.has_head and result.num_tensors == len(fairseq_state()) - 3


def test_export_to_transformers_refuses_what_it_has_not(tmp_path):
    save_checkpoint(HubertModel(HubertConfig(**{**vars(OURS), "mixer": "mamba"})), tmp_path / "m")
    convert_refused(tmp_path / "m", tmp_path / "hf", "mixer is 'mamba'; transformers' HuBERT has 'attention'", to="hf")
    save_checkpoint(HubertModel(HubertConfig(**{**vars(OURS), "position": "none"})), tmp_path / "p")
    convert_refused(tmp_path / "p", tmp_path / "hf", "position is 'none'", to="hf")


def test_transformers_old_names_and_other_heads(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS, "conv_dim": [8] * 7}
    theirs = transformers.HubertForCTC(transformers.HubertConfig(**sizes, num_conv_pos_embeddings=16))
    folder = tmp_path / "ctc"
    theirs.save_pretrained(folder)
    result = convert(folder, tmp_path / "ours")
    assert set(result.dropped) == {"lm_head.weight", "lm_head.bias"}
    (folder / "model.safetensors").unlink()
    renames = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    old = theirs.state_dict()
    for new, name in renames.items():
        old[f"hubert.encoder.pos_conv_embed.conv.{name}"] = old.pop(f"hubert.encoder.pos_conv_embed.conv.{new}")
    torch.save(old, folder / "pytorch_model.bin")
    convert(folder, tmp_path / "old")
    first, second = (load_checkpoint(tmp_path / name).state_dict() for name in ("ours", "old"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    bare = convert(folder / "pytorch_model.bin", tmp_path / "bare")
    assert bare.config.embed_dim == WIDTH and len(bare.notes) == 2
    settings = json.loads((folder / "config.json").read_text())
    for field, value in (("intermediate_size", 65), ("do_stable_layer_norm", True), ("hidden_act", "relu")):
        (folder / "config.json").write_text(json.dumps(settings | {field: value}))
        match = r"intermediate_dense.weight is \(64, 48\), expected \(65, 48\)" if value == 65 else field
        convert_refused(folder, tmp_path / "none", match)


def test_torchaudio_pretraining_model_keeps_its_head(tmp_path):
    torchaudio = pytest.importorskip("torchaudio")
    masks, heads = ("static", 0.0, 10, False, 1), (False, False, 7, 256, 0.1)
    sizes = ("group_norm", CONVS, False, WIDTH, 0.1, 16, 16, LAYERS, 12, 0.1, 64, 0.0, 0.1, False, 0.05)
    theirs = torchaudio.models.hubert_pretrain_model(*sizes, 0.8, *masks, 0.0, *masks, *heads)
    state = theirs.state_dict()
    torch.save(state, tmp_path / "ta.pt")
    result = convert(tmp_path / "ta.pt", tmp_path / "ours")
    assert result.has_head and result.num_tensors == len(state) and not result.dropped
    assert torch.equal(load_head(tmp_path / "ours").classes, state["logit_generator.label_embeddings"])
    wavs = torch.randn(1, 4000) * 0.1
    with torch.no_grad():
        last = load_checkpoint(tmp_path / "ours")(wavs).hidden_states[-1]
        torch.testing.assert_close(last, theirs.wav2vec2.eval()(wavs)[0], rtol=0, atol=1e-5)


def test_command_says_what_it_found(tmp_path, monkeypatch, capsys):
    path = save(tmp_path / "a.pt", fairseq_state("extbimamba"), optimizer_history=[])
    options = ["--source", str(path), "--out_dir", str(tmp_path / "ours")]
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint", *options])
    run_main(convert_checkpoint.main)
    printed = capsys.readouterr().out
    assert (
        "fairseq HuBERT, 2 x extbimamba, width 48" in printed and "and its pretraining head, as espnet_mamba" in printed
    )
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint", *options[:-1], str(tmp_path / "hf"), "--to", "hf"])
    with pytest.raises(SystemExit):
        run_main(convert_checkpoint.main)
    assert capsys.readouterr().err == "error: hf: mixer is 'extbimamba'; transformers' HuBERT has 'attention'\n"
