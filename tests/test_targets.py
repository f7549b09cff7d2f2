import numpy as np
import pytest
import soundfile
import torch

from espnet_mamba.data.manifest import Utterance
from espnet_mamba.targets.features import iterate_features, open_features
from espnet_mamba.targets.kmeans import assign, fit_kmeans
from espnet_mamba.targets.labels import FrameLabels, write_labels
from espnet_mamba.targets.quality import JointCounts, cluster_quality, quality_of_counts
from espnet_mamba.targets.seeding import swap
from espnet_mamba.targets.spectral import log_mel, mfcc
from espnet_mamba.targets.threads import one_thread_each


def clusters(per=200, k=5, dim=4):
    centres = torch.randn(k, dim) * 20
    return (centres[:, None] + torch.randn(k, per, dim)).reshape(-1, dim), centres


def test_kmeans_finds_planted_clusters():
    features, centres = clusters()
    found = fit_kmeans(features, 5)
    assert torch.cdist(centres, found).min(1).values.max() < 0.5
    assert torch.equal(assign(features, found).bincount(), torch.full((5,), 200))


def test_kmeans_is_the_same_for_any_number_of_shards():
    features = torch.randn(20_000, 8)
    results = [fit_kmeans(features, 30, seed=4, num_iterations=6, num_threads=n) for n in (1, 2, 7)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not torch.equal(results[0], fit_kmeans(features, 30, seed=5, num_iterations=6))


def lloyd_step(features, centroids):
    """One iteration as the book has it, in double precision."""
    labels = torch.cdist(features.double(), centroids.double()).argmin(1)
    return torch.stack([features[labels == k].double().mean(0) for k in range(len(centroids))]).float()


def inertia(features, centroids):
    return float(torch.cdist(features.double(), centroids.double()).min(1).values.square().sum())


def test_kmeans_iterates_as_the_plain_loop_does_until_nothing_moves():
    features = torch.randn(5000, 6)
    found = [fit_kmeans(features, 12, num_iterations=n, tolerance=0.0) for n in (1, 2, 3)]
    assert torch.allclose(lloyd_step(features, found[0]), found[1], atol=1e-5)
    assert torch.allclose(lloyd_step(features, found[1]), found[2], atol=1e-5)
    assert inertia(features, found[0]) > inertia(features, found[1]) > inertia(features, found[2])
    end = fit_kmeans(features, 12, num_iterations=500, tolerance=0.0)
    assert torch.allclose(lloyd_step(features, end), end, atol=1e-5)
    stopped = fit_kmeans(features, 12)  # by its tolerance: later than the first iteration, and near the end
    assert inertia(features, stopped) < inertia(features, found[0])
    assert inertia(features, stopped) < 1.02 * inertia(features, end)


def test_kmeans_finds_many_clusters_of_uneven_size():
    centres = torch.randn(60, 8) * 30
    sizes = torch.arange(60) * 4 + 20
    features = torch.repeat_interleave(centres, sizes, dim=0)
    features = (features + torch.randn(features.shape))[torch.randperm(len(features))]
    found = fit_kmeans(features, 60)
    assert torch.cdist(centres, found).min(1).values.max() < 2.0  # a start by plain draws misses some


def test_swaps_mend_a_start_that_missed_clusters():
    centres = torch.randn(12, 3) * 30
    frames = (centres[:, None] + torch.randn(12, 20, 3)).reshape(-1, 3)
    table = torch.cdist(frames, frames).square().numpy()
    bad = list(range(12))  # all in the first cluster
    good = swap(table, bad, 200, torch.Generator().manual_seed(0))
    assert sorted(index // 20 for index in good) == list(range(12)) and bad == list(range(12))
    assert table[good].min(0).sum() < 0.01 * table[bad].min(0).sum()
    with_nothing_to_gain = swap(table[:1, :1], [0], 5, torch.Generator().manual_seed(0))
    assert with_nothing_to_gain == [0]


def test_kmeans_leaves_the_number_of_threads_as_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    fit_kmeans(torch.randn(100, 2), 3, num_threads=2)
    with pytest.raises(ValueError):
        fit_kmeans(torch.full((10, 3), float("inf")), 2, num_threads=2)
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


def test_work_is_taken_in_order_and_a_failure_ends_it():
    with one_thread_each(3) as threads:
        assert list(threads.map(lambda n: n * n, range(50))) == [n * n for n in range(50)]
        begun = []

        def fail(number):
            begun.append(number)
            raise OSError(f"disk {number}")

        with pytest.raises(OSError, match="disk 0"):
            list(threads.map(fail, range(50)))
        assert len(begun) <= 3 + 2


def test_kmeans_never_leaves_a_cluster_empty():
    features = torch.cat([torch.zeros(50, 2), torch.ones(50, 2) * 9, torch.randn(9, 2) * 50])
    centroids = fit_kmeans(features, 6)
    assert (assign(features, centroids).bincount(minlength=6) > 0).all()


def test_kmeans_refuses_more_clusters_than_frames_and_nan():
    with pytest.raises(ValueError, match="11 clusters need at least as many frames, there are 10"):
        fit_kmeans(torch.randn(10, 3), 11)
    with pytest.raises(ValueError, match="NaN"):
        fit_kmeans(torch.full((10, 3), float("nan")), 2)


def test_quality_by_hand():
    phones = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    perfect = cluster_quality(phones, np.array([3, 3, 3, 1, 1, 1, 0, 0]), 4)
    assert (perfect.purity, perfect.cluster_purity, perfect.used_clusters) == (1.0, 1.0, 3)
    assert perfect.pnmi == pytest.approx(1.0)
    # clusters 0: phones 0 0 1 1; 1: phones 0 1 2 2
    score = cluster_quality(phones, np.array([0, 0, 1, 0, 0, 1, 1, 1]), 2)
    assert score.purity == pytest.approx(4 / 8) and score.cluster_purity == pytest.approx(6 / 8)
    one = cluster_quality(phones, np.zeros(8, int), 3)
    assert one.purity == pytest.approx(3 / 8) and one.pnmi == pytest.approx(0.0) and one.used_clusters == 1
    with pytest.raises(ValueError, match="clusters run from 0 to 4"):
        cluster_quality(phones, np.array([4, 0, 0, 0, 0, 0, 0, 0]), 4)


def test_quality_counted_by_utterance_is_quality_at_once():
    draw = np.random.default_rng(0)
    names = [f"p{i}" for i in draw.integers(0, 90, 400)]  # more than the table has rows at first
    clusters = draw.integers(0, 7, 400)
    counted = JointCounts(7)
    for part in (slice(0, 0), slice(0, 150), slice(150, 400)):
        counted.add(names[part], clusters[part])
    numbers = np.unique(names, return_inverse=True)[1]
    at_once = cluster_quality(numbers, clusters, 7)
    assert quality_of_counts(counted.counts()) == pytest.approx(at_once)
    left = quality_of_counts(counted.counts(without="p3"))
    assert left.num_frames == 400 - names.count("p3")
    with pytest.raises(ValueError, match="there are none"):
        quality_of_counts(JointCounts(3).counts())


@pytest.mark.parametrize("num_samples", [400, 719, 720, 16000, 16319])
def test_spectral_frames_stand_on_the_front_ends_grid(num_samples):
    wav = torch.randn(num_samples) * 0.1
    frames = (num_samples - 400) // 320 + 1
    assert log_mel(wav).shape == (frames, 80)
    assert mfcc(wav).shape == ((num_samples - 400) // 160 + 1, 39) and len(mfcc(wav)[::2]) == frames


def test_features_do_not_depend_on_batching(tmp_path):
    utterances = []
    for i, samples in enumerate((9000, 4000, 6000, 4000)):
        soundfile.write(tmp_path / f"{i}.wav", np.random.default_rng(i).normal(0, 0.1, samples), 16000)
        utterances.append(Utterance(f"u{i}", str(tmp_path / f"{i}.wav"), samples, "s", ""))
    for spec in ("mfcc100", "mfcc", "logmel"):
        one = {u.utt_id: f[0] for u, f in iterate_features(open_features(spec), utterances, batch_seconds=0.1)}
        all_ = {u.utt_id: f[0] for u, f in iterate_features(open_features(spec), utterances[::-1])}
        assert one.keys() == all_.keys() and all(torch.equal(one[u], all_[u]) for u in one)


def test_labels_round_trip(tmp_path):
    labels = {"b": np.array([1, 2, 60000]), "a": np.array([5])}
    write_labels(tmp_path / "train.npy", labels)
    read = FrameLabels(tmp_path / "train.npy")
    assert list(read) == ["a", "b"] and read["b"].tolist() == [1, 2, 60000] and read["b"].dtype == np.int64
    with pytest.raises(KeyError, match="no labels for utterance c"):
        read["c"]
    with pytest.raises(ValueError, match="does not fit in 16 bits"):
        write_labels(tmp_path / "x.npy", {"a": np.array([70000])})
    with pytest.raises(FileNotFoundError, match="stage 3"):
        FrameLabels(tmp_path / "none.npy")


def test_labels_are_found_among_ids_that_look_alike(tmp_path):
    ids = ["a", "a!", "a-1", "a-10", "a-2", "ab", "B", "z", "\u00e4", "\u4f60-1", "\U0001f600"]
    labels = {utt_id: np.arange(number) for number, utt_id in enumerate(ids)}
    write_labels(tmp_path / "train.npy", labels)
    read = FrameLabels(tmp_path / "train.npy")
    assert list(read) == sorted(ids) and len(read) == len(ids) and all(utt_id in read for utt_id in ids)
    assert all(np.array_equal(read[utt_id], labels[utt_id]) for utt_id in ids)
    assert read.counts().tolist() == [len(labels[utt_id]) for utt_id in read]
    for absent in ("", "a-", "aa", "a-1\t", "zz", "0"):
        assert absent not in read
        with pytest.raises(KeyError):
            read[absent]


def test_labels_written_before_are_read_and_files_of_two_writings_are_not(tmp_path):
    np.save(tmp_path / "train.npy", np.array([7, 8, 9], np.uint16))
    (tmp_path / "train.tsv").write_text("a\t0\t1\nb\t1\t2\n")
    assert FrameLabels(tmp_path / "train.npy")["b"].tolist() == [8, 9]
    np.save(tmp_path / "train.npy", np.array([7, 8], np.uint16))
    with pytest.raises(ValueError, match="2 labels, but train.tsv is of 3; they are not of one writing: delete both"):
        FrameLabels(tmp_path / "train.npy")
    write_labels(tmp_path / "empty.npy", {})
    assert len(FrameLabels(tmp_path / "empty.npy")) == 0 and np.load(tmp_path / "empty.npy").dtype == np.uint16
    (tmp_path / "train.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.tsv: no frame labels"):
        FrameLabels(tmp_path / "train.npy")
