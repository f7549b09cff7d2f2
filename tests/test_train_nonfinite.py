"""Steps that are not finite: skipped, written down with utterances and the module that began it; too many end a run."""

import json
import os
import signal

import pytest
import torch
from kills import STEPS, KillTest, at_step, log_of, poison, result, same, start, wait

pytestmark = pytest.mark.espnet


@pytest.fixture(scope="module")
def hubert(tmp_path_factory):
    import espnet_mamba.train.ssamba_task  # noqa: F401 -- imported once, before all forks

    return KillTest(tmp_path_factory.mktemp("hubert"), "hubert", STEPS)


def test_a_step_that_is_not_finite_is_skipped_and_explained(hubert):
    options = ("--model_conf", "layer_drop=0")
    assert wait(start(hubert, "inf", *options, before=poison({5, 6}))) == 0
    out = hubert.work / "inf"
    rows = [json.loads(row) for row in (out / "nonfinite_steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 6]
    for row in rows:
        assert row["where"] == "the output of model.hubert.blocks.1 (EncoderBlock)"
        assert row["utterances"] and all(utt.startswith("train") for utt in row["utterances"])
    state = torch.load(out / "checkpoint.pth", weights_only=True)
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    log = [json.loads(row) for row in (out / "train_log.jsonl").read_text().splitlines()]
    assert all(row["loss"] == row["loss"] for row in log), "a skipped step is not part of the means"

    def dies():
        poison({5, 6})()
        at_step(8, lambda _: os.kill(os.getpid(), signal.SIGKILL))()

    assert wait(start(hubert, "inf2", *options, before=dies)) == -9
    assert wait(start(hubert, "inf2", *options)) == 0
    assert same(result(out), result(hubert.work / "inf2")), "skipped steps are resumed over like any other"


def test_too_many_in_a_row_end_the_run_even_over_a_restart(hubert):
    options = ("--max_nonfinite_steps", 4, "--model_conf", "layer_drop=0")

    def dies():
        poison({2, 3, 4, 5, 6})()
        at_step(4, lambda _: os.kill(os.getpid(), signal.SIGKILL))()

    assert wait(start(hubert, "row", *options, before=dies)) == -9
    assert wait(start(hubert, "row", *options, before=poison({4, 5, 6}))) == 1
    last = log_of(hubert, "row").splitlines()[-1]
    assert "4 steps in a row had gradients that are not finite, the last at step 5" in last
    assert "first in the output of model.hubert.blocks.1" in last


def test_first_nonfinite_names_the_place():
    from espnet_mamba.train.nonfinite import FINITE, first_nonfinite

    class Root(torch.nn.Module):
        def forward(self, x):
            return x.sqrt()

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), Root(), torch.nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.fill_(1)
        model[0].bias.zero_()
    places = {
        1.0: FINITE,
        0.0: "the gradient at 0 (Linear)'s output",  # the root's slope at 0
        -1.0: "the output of 1 (Root)",
        float("nan"): "the output of 0 (Linear)",
    }
    for value, place in places.items():
        assert first_nonfinite(model, lambda value=value: model(torch.full((1, 2), value)).sum()) == place
    assert all(parameter.grad is None for parameter in model.parameters())
    assert first_nonfinite(model, lambda: model(torch.ones(1, 2)).sum() / 0) == "the loss"
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_audio_is_named_by_utterance_and_statistics_are_put_back(tmp_path, caplog):
    from espnet_mamba.train.nonfinite import NonFiniteGuard

    model = torch.nn.BatchNorm1d(2)
    guard = NonFiniteGuard(model, tmp_path, limit=2, rank=0, distributed=False)
    before = [buffer.clone() for buffer in model.buffers()]
    guard.before_step()
    speech = torch.ones(3, 2)
    speech[1, 0] = float("nan")
    model(speech)
    guard.bad_step(7, [["a", "b", "c"]], [{"speech": speech}], lambda part: model(speech).sum())
    row = json.loads((tmp_path / "nonfinite_steps.jsonl").read_text())
    assert row == {"step": 7, "rank": 0, "where": "the audio itself", "utterances": ["b"]}
    assert same(before, list(model.buffers())), "no NaN stays in the running mean"
    guard.good_step()
    guard.before_step()
    guard.bad_step(9, [["a"]], [{"speech": speech[:1]}], lambda part: model(speech).sum())
    with pytest.raises(ValueError, match="2 steps in a row .* the last at step 10"):
        guard.bad_step(10, [["a"]], [{"speech": speech[:1]}], lambda part: model(speech).sum())
