"""Two processes train as one does, stop together, and hand over to one; and the other way round."""

import json
import os
import signal
import socket

import pytest
from kills import STEPS, KillTest, at_step, log_of, poison, result, start, wait

pytestmark = pytest.mark.espnet


@pytest.fixture(scope="module")
def hubert(tmp_path_factory):
    import espnet_mamba.train.ssamba_task  # noqa: F401 -- imported once, before all forks

    return KillTest(tmp_path_factory.mktemp("hubert"), "hubert", STEPS)


def start_two(test, name, *extra, before=lambda rank: None):
    """Start a run of two processes over gloo; return their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": "0"}
    options = ("--dist_backend", "gloo", *extra)
    return [
        start(test, name, *options, before=lambda rank=rank: before(rank), RANK=str(rank), **environment)
        for rank in range(2)
    ]


def order_to(folder):
    """Return what makes a child write the utterances of its batches, one line per batch."""

    def patch(rank=0):
        from espnet_mamba.train.trainer import TrainingRun

        train_steps = TrainingRun.train_steps

        def noting(self, batches, step, *args):
            def noted():
                for utt_ids, batch in batches:
                    with (folder / f"order{rank}").open("a") as handle:
                        handle.write(" ".join(utt_ids) + "\n")
                    yield utt_ids, batch

            return train_steps(self, noted(), step, *args)

        TrainingRun.train_steps = noting

    return patch


def test_one_of_two_processes_is_asked_to_stop_and_one_process_goes_on(hubert, tmp_path):
    """The rest of the run sees the same global batches; then the loss is the same but for each batch's masks."""

    def before(rank):
        order_to(tmp_path)(rank)
        if rank == 1:
            at_step(5, lambda _: os.kill(os.getpid(), signal.SIGTERM))()

    assert [wait(pid) for pid in start_two(hubert, "two", before=before)] == [0, 0]
    assert json.loads((hubert.work / "two/interrupted.json").read_text())["step"] == 5
    first, second = ((tmp_path / f"order{rank}").read_text().splitlines() for rank in range(2))
    assert len(first) == len(second) == 5
    alone = tmp_path / "alone"
    alone.mkdir()
    assert wait(start(hubert, "two", before=order_to(alone))) == 0
    assert wait(start(hubert, "one", before=order_to(tmp_path / "alone"))) == 0
    lines = (alone / "order0").read_text().splitlines()
    rest, whole = lines[: STEPS - 5], lines[STEPS - 5 :]
    assert [sorted(a.split() + b.split()) for a, b in zip(first, second, strict=True)] == [
        sorted(line.split()) for line in whole[:5]
    ]
    assert rest == whole[5:]
    assert [row["step"] for row in result(hubert.work / "two")["log"]] == [
        row["step"] for row in hubert.expected["log"]
    ]


def own_batches(rank, world):
    """Return what makes a child's processes take batches of three utterances by number, each its own.

    So that "twice the batch" can be said exactly: iteration i of process r takes number ``i * world + r``.
    """

    def patch():
        from espnet_mamba.train.iterators import StepIterFactory

        shared = StepIterFactory.batch

        def batch(self, index):
            if not self.shuffle:
                return shared(self, index)
            number = (index * world + rank) % 4
            return [f"train{i:02d}" for i in range(3 * number, 3 * number + 3)]

        StepIterFactory.batch, StepIterFactory.batches_per_iter = batch, world

    return patch


def train_rows(test, name):
    rows = [json.loads(row) for row in (test.work / name / "train_log.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows if row["split"] == "train"]


def assert_same_lines(rows, expected):
    assert [row[0] for row in rows] == [row[0] for row in expected] == list(range(1, STEPS + 1))
    for row, wanted in zip(rows, expected, strict=True):
        assert row[1:] == pytest.approx(wanted[1:], rel=1e-4), row


def test_two_processes_are_one_with_twice_the_batch_even_halfway(hubert):
    """Masks, layer drop and dropout draw by the batch's number in the run, and a mean is over all masked frames."""
    one = ("--log_interval", 1, "--accum_grad", 2, "--num_iters_per_epoch", 8)
    two = ("--log_interval", 1, "--accum_grad", 1, "--num_iters_per_epoch", 4)
    assert wait(start(hubert, "twice", *one, before=own_batches(0, 1))) == 0
    expected = train_rows(hubert, "twice")
    for name, step in (("pair", 99), ("halfway", 6)):

        def before(rank, step=step):
            own_batches(rank, 2)()
            if rank == 0:
                at_step(step, lambda _: os.kill(os.getpid(), signal.SIGTERM))()

        assert [wait(pid) for pid in start_two(hubert, name, *two, before=before)] == [0, 0], log_of(hubert, name)
    assert_same_lines(train_rows(hubert, "pair"), expected)
    assert len(train_rows(hubert, "halfway")) == 6
    assert wait(start(hubert, "halfway", *one, before=own_batches(0, 1))) == 0
    assert_same_lines(train_rows(hubert, "halfway"), expected)


def test_buckets_taken_in_turns_by_two_processes_are_those_of_one(hubert):
    bucket = ("--log_interval", 1, "--batch_type", "bucket", "--batch_bins", 30_000)
    assert wait(start(hubert, "bucket1", *bucket, "--accum_grad", 2, "--num_iters_per_epoch", 8)) == 0
    pids = start_two(hubert, "bucket2", *bucket, "--accum_grad", 1, "--num_iters_per_epoch", 4)
    assert [wait(pid) for pid in pids] == [0, 0], log_of(hubert, "bucket2")
    assert_same_lines(train_rows(hubert, "bucket2"), train_rows(hubert, "bucket1"))


def test_an_infinity_in_one_process_is_skipped_by_both_and_found_where_it_is(hubert):
    """The gradient is everyone's; only the process that had the batch can name the module."""

    def before(rank):
        poison({3} if rank else {99})()

    options = ("--model_conf", "layer_drop=0", "--max_steps", 5)
    pids = start_two(hubert, "inf", *options, before=before)
    assert [wait(pid) for pid in pids] == [0, 0], log_of(hubert, "inf")[-2000:]
    rows = (hubert.work / "inf/nonfinite_steps.jsonl").read_text().splitlines()
    first, second = (json.loads(row) for row in rows)
    assert (first["step"], first["rank"], second["step"], second["rank"]) == (3, 0, 3, 1)
    assert first["where"].startswith("nothing when repeated")
    assert second["where"] == "the output of model.hubert.blocks.1 (EncoderBlock)"
    assert not set(first["utterances"]) & set(second["utterances"])


def test_two_processes_compute_blocks_twice_and_try_their_largest_batches_first(hubert):
    """Neither changes a number; hours are those of both processes together."""
    options = ("--log_interval", 1, "--max_steps", 5, "--peak_tflops", 1)
    tried = ("--activation_checkpointing", "true", "--worst_batches_first", "true")
    found = {}
    for name, extra in (("as it is", ()), ("recomputed", tried)):
        assert [wait(pid) for pid in start_two(hubert, name, *options, *extra)] == [0, 0], log_of(hubert, name)[-2000:]
        lines = (hubert.work / name / "train_log.jsonl").read_text().splitlines()
        found[name] = [row for row in map(json.loads, lines) if row["split"] == "train"]
    keys = ("step", "loss", "grad_norm", "accuracy_masked", "accuracy_unmasked", "hours_seen")
    one, other = ([[row[key] for key in keys] for row in rows] for rows in found.values())
    assert one == other and all(row["mfu"] > 0 for row in found["recomputed"])
    assert "worst batches first" in log_of(hubert, "recomputed")
    assert "activation checkpointing: 3 blocks" in log_of(hubert, "recomputed")
    row = found["recomputed"][0]
    assert row["audio_rate"] * row["seconds"] == pytest.approx(3600 * row["hours_seen"]), "of both, in one's time"
