"""Batches by number: drawn anew in each pass, the same for any number of processes, workers and starts."""

import logging
import os
import re
import signal

import numpy as np
import pytest
import torch
from kills import fork, wait

from espnet_mamba.data.errors import AudioError
from espnet_mamba.train.collate import HubertCollate

pytestmark = pytest.mark.espnet


def like_librispeech(count, seed=0):
    """Return lengths with LibriSpeech's shape: most of 12 to 16 s, a tail down to 1.3 s; 12.3 s on average."""
    rng = np.random.default_rng(seed)
    long = rng.random(count) < 0.65
    seconds = np.where(long, rng.normal(14.7, 1.2, count), rng.uniform(1.3, 14, count))
    return (16000 * np.clip(seconds, 1.3, 24.5)).astype(np.int64)


def bucket(lengths, bins, seed=0, **options):
    from espnet_mamba.train.bucket_batches import BucketBatches

    return BucketBatches(np.array([f"u{i:06d}" for i in range(len(lengths))], "S"), lengths, bins, seed, **options)


def kept_and_offered(row, numbers):
    """Return the samples left of batches after cropping to their shortest, and those before."""
    kept = offered = 0
    for number in numbers:
        lengths = row.lengths[row.indices(number)]
        kept, offered = kept + len(lengths) * lengths.min(), offered + lengths.sum()
    return kept, offered


@pytest.mark.parametrize(("count", "bins"), [(12, 40_000), (700, 1_400_000), (20_000, 5_600_000)])
def test_a_pass_holds_everyone_once_within_the_bins(count, bins):
    lengths = like_librispeech(count) if count > 12 else np.random.default_rng(0).integers(6000, 12000, 12)
    row = bucket(lengths, bins, max_samples=250_000)
    for number in range(3):
        batches = [row.indices(n) for n in range(number * len(row), (number + 1) * len(row))]
        assert sorted(np.concatenate(batches)) == list(range(count))
        assert max(len(b) * row.lengths[b].min() for b in batches) <= bins
        assert max(len(b) * row.lengths[b].max() for b in batches if len(b) > 1) <= bins
    assert sum(len(b) * row.lengths[b].min() for b in batches) > 0.75 * bins * (len(row) - 1), "batches are full"


def test_at_most_two_percent_are_cropped_away():
    row = bucket(like_librispeech(20_000), 5_600_000, max_samples=250_000)
    kept, offered = kept_and_offered(row, range(len(row)))
    assert 0.98 < kept / offered < 1


def test_who_meets_whom_is_drawn_anew_and_depends_on_nothing_else():
    row = bucket(like_librispeech(2000), 2_000_000)
    first, second = ({frozenset(row.batch(n)) for n in range(p * len(row), (p + 1) * len(row))} for p in (0, 1))
    assert len(first & second) < 0.1 * len(first)
    numbers = [7 * len(row) + 5, 3, 7 * len(row) + 6, len(row) - 1]
    fresh = [bucket(like_librispeech(2000), 2_000_000).batch(n) for n in numbers]
    assert [row.batch(n) for n in numbers] == fresh
    assert bucket(like_librispeech(2000), 2_000_000, seed=1).batch(3) != row.batch(3)
    assert [len(row.batch(n)) for n in range(20)] != [len(row.batch(n)) for n in range(len(row), len(row) + 20)]


def test_validation_goes_by_length_always_the_same():
    row = bucket(like_librispeech(300), 2_000_000, jitter=0.0)
    lengths = np.concatenate([row.lengths[row.indices(n)] for n in range(len(row))])
    assert (np.diff(lengths) >= 0).all() and row.batch(len(row)) == row.batch(0)


def test_a_recording_longer_than_the_bins_has_a_batch_to_itself():
    row = bucket(np.array([5000, 90_000, 4000]), 10_000, jitter=0.0)
    assert sorted(sorted(row.batch(n)) for n in range(len(row))) == [["u000000", "u000002"], ["u000001"]]


def test_the_largest_batches_are_found():
    row = bucket(like_librispeech(2000), 2_000_000, max_samples=250_000)
    sizes = {}
    for number in range(len(row)):
        lengths = row.lengths[row.indices(number)]
        sizes[tuple(row.batch(number))] = (len(lengths) * lengths.min(), len(lengths) * lengths.min() ** 2)
    found = [sizes[tuple(batch)] for batch in row.batches]
    assert max(size[0] for size in found) == max(size[0] for size in sizes.values())
    assert max(size[1] for size in found) == max(size[1] for size in sizes.values())


class Corpus:
    """Recordings made of their number and the place in them; some cannot be read, one kills whoever reads it."""

    def __init__(self, count, bad=(), deadly="", odd=()):
        self.ids, self.bad, self.deadly, self.odd = [f"u{i:06d}" for i in range(count)], bad, deadly, odd
        self.lengths = np.random.default_rng(0).integers(2000, 6000, count)

    def __getitem__(self, utt_id):
        if utt_id == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if utt_id in self.bad:
            raise AudioError(f"/data/{utt_id}.flac", "truncated", "5 samples", "6 samples", "copy it again")
        number = int(utt_id[1:])
        samples = int(self.lengths[number])
        labels = np.full((samples - 400) // 320 + 1 + (utt_id in self.odd), number)
        return utt_id, {"speech": 10_000.0 * number + np.arange(samples), "labels": labels}


FACTORIES = []  # of the test that runs


@pytest.fixture(autouse=True)
def _end_workers():
    """Workers live as long as their factory: a later test's forks must not take them for children of theirs."""
    yield
    while FACTORIES:
        FACTORIES.pop().close()


def factory(corpus, workers=0, turns=(0, 1), train=True, unreadable=None, iterations=None, packed=False):
    from espnet_mamba.train.iterators import StepIterFactory

    row = bucket(corpus.lengths, 20_000, jitter=0.01 if train else 0.0)
    collate = HubertCollate(50, 0, train, packed=packed)
    options = {"turns": turns, "unreadable": unreadable, "set_name": "train"}
    made = StepIterFactory(corpus, row, collate, train, iterations, workers, False, **options)
    FACTORIES.append(made)
    return made


def ids_of(batches):
    return [ids for ids, _ in batches]


def test_any_number_of_processes_sees_the_same_row():
    corpus = Corpus(60)
    whole = ids_of(factory(corpus, iterations=24).build_iter(2))
    for world in (2, 3):
        parts = [factory(corpus, turns=(rank, world), iterations=24 // world) for rank in range(world)]
        assert {part.batches_per_iter for part in parts} == {world}
        taken = [ids_of(part.build_iter(2)) for part in parts]
        assert [ids for together in zip(*taken, strict=True) for ids in together] == whole
        resumed = [ids_of(part.build_iter(2, skip=12 // world)) for part in parts]
        assert [ids for together in zip(*resumed, strict=True) for ids in together] == whole[12:]


def test_validation_counts_each_batch_once_in_any_number_of_processes():
    corpus = Corpus(30)
    for world in (1, 2, 3, 50):
        parts = [factory(corpus, turns=(rank, world), train=False) for rank in range(world)]
        seen = [utt for part in parts for ids in ids_of(part.build_iter(1)) for utt in ids]
        assert sorted(seen) == corpus.ids


def test_workers_live_on_and_change_nothing():
    """Their results are those of no workers, also behind an epoch that was left in the middle."""
    corpus = Corpus(40)
    alone, shared = factory(corpus, iterations=9), factory(corpus, workers=2, iterations=9)
    for epoch in (1, 2):
        for (ids, batch), (expected_ids, expected) in zip(
            shared.build_iter(epoch), alone.build_iter(epoch), strict=True
        ):
            assert ids == expected_ids and torch.equal(batch["labels"], expected["labels"])
    pids = {worker.pid for worker in shared._loader._iterator._workers}
    left = shared.build_iter(3)
    next(left)
    tail = shared.build_iter(5, skip=4)
    assert ids_of(tail) == ids_of(alone.build_iter(5))[4:]
    assert {worker.pid for worker in shared._loader._iterator._workers} == pids and len(pids) == 2
    assert all(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_crops_depend_on_the_epoch_in_living_workers():
    corpus = Corpus(40)
    shared, moved = factory(corpus, workers=1, iterations=9), 0
    for epoch in (1, 2, 3):
        for ids, batch in shared.build_iter(epoch):
            items = [corpus[utt] for utt in ids]
            expected, later = (HubertCollate(50, 0, True, epoch=e)(items)[1]["speech"] for e in (epoch, epoch + 1))
            assert torch.equal(batch["speech"], expected)
            moved += not torch.equal(batch["speech"], later)
    assert moved > 5


def test_one_bad_file_is_left_out_and_named_once(tmp_path, caplog):
    from espnet_mamba.train.unreadable import Unreadable

    corpus, bad = Corpus(40), "u000007"
    corpus.bad = (bad,)
    unreadable = Unreadable(tmp_path, 40, 0.05)
    batches = factory(corpus, workers=1, unreadable=unreadable, iterations=30)
    with caplog.at_level(logging.WARNING):
        seen = [ids for epoch in (1, 2) for ids in ids_of(batches.build_iter(epoch))]
    everyone = ids_of(factory(Corpus(40), iterations=30).build_iter(1))
    assert [[utt for utt in ids if utt != bad] for ids in everyone] == seen[:30]
    named = [record.message for record in caplog.records if bad in record.message]
    assert named == [f"{bad} is left out: /data/{bad}.flac: 5 samples (6 samples); copy it again"]
    rows = (tmp_path / "unreadable.tsv").read_text().splitlines()
    assert rows[1:] == [f"train\t{bad}\ttruncated\t/data/{bad}.flac\t5 samples\t6 samples\tcopy it again"]
    list(factory(corpus, unreadable=Unreadable(tmp_path, 40, 0.05)).build_iter(1))  # started again
    assert (tmp_path / "unreadable.tsv").read_text().splitlines() == rows


def test_labels_that_do_not_fit_leave_one_out_too(tmp_path):
    from espnet_mamba.train.unreadable import Unreadable

    corpus = Corpus(20, odd=("u000003",))
    seen = ids_of(factory(corpus, unreadable=Unreadable(tmp_path, 20, 0.05)).build_iter(1))
    assert "u000003" not in [utt for ids in seen for utt in ids]
    assert "u000003\tlabels\t" in (tmp_path / "unreadable.tsv").read_text()


def test_a_batch_of_which_nothing_can_be_read_is_replaced_by_the_next():
    """No process may be a step ahead of the others; in validation there is nothing to keep up with."""
    everyone = ids_of(factory(Corpus(40), iterations=7).build_iter(1))
    corpus = Corpus(40, bad=everyone[4])
    assert ids_of(factory(corpus, iterations=7).build_iter(1)) == everyone[:4] + [everyone[5]] + everyone[5:]
    validated = ids_of(factory(Corpus(40), train=False).build_iter(1))
    corpus = Corpus(40, bad=validated[2])
    assert ids_of(factory(corpus, train=False).build_iter(1)) == validated[:2] + validated[3:]


def test_a_disk_that_is_gone_ends_the_run(tmp_path):
    from espnet_mamba.train.unreadable import Unreadable

    corpus = Corpus(40, bad=[f"u{i:06d}" for i in range(0, 40, 2)])
    with pytest.raises(ValueError, match=r"number 11 of 40 utterances of train .*at most 10, --max_unreadable"):
        list(factory(corpus, unreadable=Unreadable(tmp_path, 40, 0.05), iterations=60).build_iter(1))
    with pytest.raises(ValueError, match=r"batch 0 and the next have nothing that can be read: u0000"):
        list(factory(Corpus(4, bad=[f"u{i:06d}" for i in range(4)])).build_iter(1))


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_no_fault_of_the_audio_ends_the_run_in_one_line(workers):
    class Unlabelled(Corpus):
        def __getitem__(self, utt_id):
            raise KeyError(f"labels.npy: no labels for utterance {utt_id}; rerun the targets stage")

    with pytest.raises(ValueError, match=r"^labels.npy: no labels for utterance u\d+; rerun the targets stage$"):
        list(factory(Unlabelled(10), workers=workers).build_iter(1))


def test_a_worker_that_dies_leaves_the_name_of_what_it_was_reading(tmp_path):
    """In a process of its own: PyTorch tells of a dead worker by an exception wherever the program happens to be."""

    def read():
        with pytest.raises(RuntimeError) as caught:
            list(factory(Corpus(3, deadly="u000001"), workers=1).build_iter(1))
        (tmp_path / "said").write_text(str(caught.value))
        os._exit(0)

    assert wait(fork(read, tmp_path / "log")) == 0, (tmp_path / "log").read_text()
    said = (tmp_path / "said").read_text()
    assert re.search(r"batch \d+ of epoch 1: .*being read: u000001\); if memory ran out", said), said


def test_fixed_batches_are_as_they_were():
    """What ``numel`` and ``packed`` runs of earlier versions resume to."""
    from espnet_mamba.train.iterators import FixedBatches

    batches = [(f"a{i}", f"b{i}") for i in range(7)]
    row = FixedBatches(batches, seed=3, shuffle=True)
    for index in (0, 6, 7, 20, 3):
        number, position = divmod(index, 7)
        expected = batches[int(np.random.default_rng([3, number]).permutation(7)[position])]
        assert row.batch(index) == expected
    assert [FixedBatches(batches, 3, False).batch(i) for i in range(7)] == batches
