import numpy as np
import pytest
import soundfile
import torch

from espnet_mamba.data.manifest import Utterance
from espnet_mamba.targets.features import iterate_features, open_features
from espnet_mamba.targets.kmeans import assign, fit_kmeans
from espnet_mamba.targets.labels import FrameLabels, write_labels
from espnet_mamba.targets.quality import cluster_quality
from espnet_mamba.targets.spectral import log_mel, mfcc


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
    results = [fit_kmeans(features, 30, seed=4, num_iterations=6, num_shards=n) for n in (1, 2, 7)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not torch.equal(results[0], fit_kmeans(features, 30, seed=5, num_iterations=6))


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
