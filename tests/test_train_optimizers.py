"""The optimizer: what decays, fused updates, and checkpoints of another grouping or an older version."""

import dataclasses

import pytest
import torch
from test_models_hubert import TINY
from test_train import corpus, train  # noqa: F401 -- corpus is a fixture
from test_train_engine import CONFIGS, SSAMBA
from test_train_log import log_rows

from espnet_mamba.layers.block import MIXERS
from espnet_mamba.models.pretraining import HubertForPretraining
from espnet_mamba.models.ssamba.pretraining import SsambaForPretraining


def adamw(model, **options):
    from espnet_mamba.train.optimizers import build_optimizer

    exclude = options.pop("exclude", True)
    return build_optimizer(model, torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.5} | options, exclude)


@pytest.mark.parametrize("mixer", [*MIXERS, "macaron", "ssamba"])
def test_what_decays_are_matrices_and_embeddings(mixer):
    if mixer == "ssamba":
        model = SsambaForPretraining(SSAMBA)
    elif mixer == "macaron":
        model = HubertForPretraining(CONFIGS["macaron"], 7)
    else:
        model = HubertForPretraining(dataclasses.replace(TINY, mixer=mixer, num_heads=2, head_dim=4), 7)
    optimizer = adamw(model)
    decayed, kept = (set(group["names"]) for group in optimizer.state_dict()["param_groups"])
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    assert decayed | kept == {name for name, _ in model.named_parameters()} and not decayed & kept
    for name in decayed:
        last = name.rpartition(".")[2]
        assert last in ("weight", "original0", "original1", "classes", "mask_embedding") and "norm" not in name, name
    for name in kept:
        end = name.endswith(("A_log", "A_b_log", ".D", ".D_b", "bias", "class_token", "positions"))
        assert end or "norm" in name or mixer == "ssamba" and name.endswith("mask_embedding"), name
    assert [g["fused"] for g in optimizer.param_groups] == [True, True]


def test_a_parameter_without_gradient_pull_keeps_its_value_unless_it_decays():
    model = HubertForPretraining(TINY, 7)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = adamw(model)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if name in optimizer.state_dict()["param_groups"][0]["names"] else 1.0
        torch.testing.assert_close(parameter, before[name] * factor, msg=name)


def stepped(optimizer, model, steps=2):
    for step in range(steps):
        for i, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(1000 * step + i)
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return optimizer


def twin(model):
    other = HubertForPretraining(TINY, 7)
    other.load_state_dict(model.state_dict())
    return other


def test_fused_updates_are_the_plain_ones_and_either_reads_the_others_checkpoint():
    model = HubertForPretraining(TINY, 7)
    other = twin(model)
    fused, plain = stepped(adamw(model), model), stepped(adamw(other, fused=False, foreach=False), other)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    for ours, theirs, state_of in ((model, other, plain), (other, model, fused)):
        third = twin(theirs)
        again = adamw(third, fused=ours is model)
        again.load_state_dict(state_of.state_dict())
        assert again.param_groups[0]["fused"] is (ours is model), "this run's say, not the file's"
        stepped(again, third, 1)


def test_checkpoints_of_another_grouping_and_of_older_versions_are_put_in_order():
    model = HubertForPretraining(TINY, 7)
    flat = stepped(adamw(model, exclude=False), model).state_dict()
    moments = {n: flat["state"][i]["exp_avg"] for i, n in enumerate(flat["param_groups"][0]["names"])}
    grouped = adamw(model)
    grouped.load_state_dict(flat)
    for name, parameter in model.named_parameters():
        assert torch.equal(grouped.state[parameter]["exp_avg"], moments[name]), name
    assert [group["weight_decay"] for group in grouped.param_groups] == [0.5, 0.0]

    older = grouped.state_dict()  # of before names were kept: ESPnet's two groups, which are the same
    for group in older["param_groups"]:
        del group["names"]
    again = adamw(model)
    again.load_state_dict(older)
    assert all(torch.equal(again.state[p]["exp_avg"], moments[n]) for n, p in model.named_parameters())
    one, other = (optimizer.state_dict()["param_groups"] for optimizer in (again, grouped))
    assert one == other and "names" in one[0], "and are named from then on"
    del flat["param_groups"][0]["names"]
    with pytest.raises(ValueError, match=r"of an older version, has groups of \[\d+\] parameters, this run's has"):
        adamw(model).load_state_dict(flat)


@pytest.mark.espnet
def test_an_older_run_without_names_resumes(corpus, root, tmp_path):  # noqa: F811
    from espnet_mamba.train.checkpoint import read_state, write_state

    whole = train(corpus, tmp_path / "w", root, "--max_steps", 4, "--log_interval", 1)
    train(corpus, tmp_path / "r", root, "--max_steps", 2, "--log_interval", 1, "--scheduler_conf", "total_steps=4")
    state = read_state(tmp_path / "r/checkpoint.pth")
    for group in state["optimizer"]["param_groups"]:
        del group["names"]
    del state["hours_seen"]
    write_state(tmp_path / "r/checkpoint.pth", state)
    rows = train(corpus, tmp_path / "r", root, "--max_steps", 4, "--log_interval", 1)
    assert [row for row in rows if row[1] == "train"] == [row for row in whole if row[1] == "train"]
    hours = ["hours_seen" in row for row in log_rows(tmp_path / "r") if row["split"] == "train"]
    assert hours == [True, True, False, False], "what an older checkpoint does not say is not made up"
