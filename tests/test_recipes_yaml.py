"""The pretraining YAMLs of the papers and the LibriSpeech recipes: parsed as training does, against docs/papers.md."""

import re

import pytest
import torch
import yaml

from espnet_mamba.bin.prepare_librispeech import get_parser

pytestmark = pytest.mark.espnet
# What iterations 1 and 2 must come to: seconds of audio an update, updates, peak rate, GPUs, samples of a GPU's batch
CONFIGS = {
    "paper1": ((2800, 250_000, 5e-4, 8, 5.6e6), (2800, 400_000, 5e-4, 8, 5.6e6)),
    "paper2_base": ((700, 250_000, 5e-4, 1, 5.6e6), (700, 400_000, 5e-4, 1, 2.8e6)),
    "paper2_base_bidirectional": ((700, 250_000, 5e-5, 1, 5.6e6), (700, 400_000, 5e-5, 8, 1.4e6)),
    "paper2_small": ((700, 250_000, 5e-4, 1, 5.6e6), (700, 400_000, 5e-4, 1, 2.8e6)),
    "librispeech_100": ((350, 25_000, 5e-4, 1, 5.6e6), (350, 50_000, 5e-4, 1, 5.6e6)),
    "mini_librispeech": ((87.5, 15_000, 5e-4, 1, 1.4e6), (87.5, 30_000, 5e-4, 1, 1.4e6)),
}
FILES = [f"{name}_it{iteration}" for name in CONFIGS for iteration in (1, 2)]
RECIPES = ("librispeech", "librispeech_100", "mini_librispeech")


def parsed(root, name, folder):
    from espnet_mamba.train.task import HubertTask

    words = ["--config", root / f"conf/pretrain/{name}.yaml", "--model", root / "conf/models/extbimamba_tiny.yaml"]
    return HubertTask.get_parser().parse_args([str(word) for word in (*words, "--output_dir", folder)])


def model_and_optimizer(args):
    """What training makes of the options, with a small model."""
    from espnet_mamba.train.task import HubertTask

    model = HubertTask.build_model(args)
    return model, HubertTask.build_optimizers(args, model)[0]


@pytest.mark.parametrize("name", FILES)
def test_a_config_is_what_the_papers_say(name, root, tmp_path):
    from espnet2.tasks.abs_task import scheduler_classes

    seconds, updates, rate, gpus, samples = CONFIGS[name[:-4]][int(name[-1]) - 1]
    args = parsed(root, name, tmp_path)
    assert args.batch_type == "bucket" and args.batch_bins == samples  # of each process
    assert gpus * args.batch_bins * args.accum_grad / 16000 == seconds
    text = (root / f"conf/pretrain/{name}.yaml").read_text()
    assert f"Assumes {gpus} GPU" in text and f"{seconds:g} s per update" in text
    assert (args.max_steps, args.grad_clip, args.max_crop_samples) == (updates, 10, 250_000)
    assert args.num_iters_per_epoch % args.accum_grad == 0
    if name.startswith("paper"):
        assert args.num_iters_per_epoch / args.accum_grad == 10_000
    assert (args.mask_prob, args.mask_length, args.feature_penalty_weight) == (0.8, 10, 10.0)
    _, optimizer = model_and_optimizer(args)
    assert isinstance(optimizer, torch.optim.AdamW) and {group["lr"] for group in optimizer.param_groups} == {rate}
    groups = optimizer.param_groups
    assert all(group["betas"] == (0.9, 0.98) and group["eps"] == 1e-6 for group in map(_tuples, groups))
    assert {group["weight_decay"] for group in groups} == {0.0, 0.01}
    schedule = scheduler_classes[args.scheduler](optimizer, **args.scheduler_conf)
    assert schedule.warmup_steps == 0.08 * updates and schedule.total_steps == updates and schedule.power == 1
    schedule.last_epoch = schedule.warmup_steps - 1
    assert schedule.get_lr()[0] == pytest.approx(rate)
    schedule.last_epoch = updates
    assert schedule.get_lr()[0] == 0


def _tuples(group):
    return group | {"betas": tuple(group["betas"])}


@pytest.mark.parametrize("name", FILES)
def test_every_key_has_its_meaning_and_source(name, root):
    text = (root / f"conf/pretrain/{name}.yaml").read_text()
    sources = ("P1", "P2", "HuBERT", "ours")
    for line in text.splitlines():
        key = re.match(r" *(\w+):(.*)", line)
        if not key or line.startswith("#") or key.group(1) in ("optim_conf", "scheduler_conf"):
            continue
        comment = key.group(2).partition(" # ")[2]
        assert any(source in comment for source in sources), line
    assert re.search(r"(P|[Pp]aper )[12]", text.partition("batch_type")[0])  # the head says whose it is
    config = yaml.safe_load(text)
    assert not set(config) & {"num_classes", "label_rate", "model", "output_dir"}  # the engine's to give


def test_unknown_keys_fail(root, tmp_path, capsys):
    from espnet_mamba.train.task import HubertTask

    text = (root / "conf/pretrain/paper2_small_it1.yaml").read_text()
    (tmp_path / "a.yaml").write_text(text.replace("mask_length:", "mask_lenght:"))
    with pytest.raises(SystemExit):
        HubertTask.get_parser().parse_args(["--config", str(tmp_path / "a.yaml"), "--output_dir", str(tmp_path)])
    assert "mask_lenght" in capsys.readouterr().err


def test_the_open_questions_are_said(root):
    for iteration in (1, 2):
        text = (root / f"conf/pretrain/paper2_base_bidirectional_it{iteration}.yaml").read_text()
        assert "Open: the learning rate. The paper reports 5e-5" in text and "public YAMLs say 5e-4" in text


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_names_what_is_there(recipe, root):
    folder = root / f"egs2/{recipe}/ssl1"
    lines = [line.split("#")[0].split() for line in (folder / "run.sh").read_text().splitlines()]
    settings = {words[0]: words[1] for words in lines if len(words) == 2 and words[0].startswith("--")}
    assert settings["--corpus"] == recipe and settings["--corpus_dir_is"] == "own"
    assert (root / f"conf/models/{settings['--model']}.yaml").is_file()
    for iteration in (1, 2):
        assert f"{settings[f'--pretrain{iteration}_config']}" in FILES
        assert settings[f"--pretrain{iteration}_config"].endswith(f"_it{iteration}")
    assert (settings["--num_clusters1"], settings["--num_clusters2"], settings["--target_layer"]) == ("100", "500", "6")
    for name in ("cmd.sh", "path.sh"):
        assert (folder / name).resolve() == root / "egs2/TEMPLATE/ssl1" / name


def test_the_readme_names_configs_and_models_that_exist(root):
    text = (root / "egs2/librispeech/README.md").read_text()
    configs = set(re.findall(r"\bpaper[12]_\w+", text))
    assert configs == {f"{name}_it{i}" for name in CONFIGS if name.startswith("paper") for i in (1, 2)}
    for model in re.findall(r"--model (\w+)", text):
        assert (root / f"conf/models/{model}.yaml").is_file(), model
    engine = (root / "egs2/TEMPLATE/ssl1/ssl.sh").read_text()
    for option in set(re.findall(r"--(\w+)", text)):
        assert f"\n{option}=" in engine or f"--{option}" in get_parser().format_help(), option
