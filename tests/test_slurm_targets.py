"""Stages 3 and 5 as jobs: an array of a real Slurm, and processes of this machine, both as run.sh starts them."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from slurm_cluster import unavailable
from test_targets_shards import LAUNCHER, dump, run_fake  # noqa: F401 (dump is a fixture)

from espnet_mamba.recipe.sharded import StepFailedError
from espnet_mamba.targets.pipeline import TargetOptions, make_targets

needs_slurm = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "there is one")


@pytest.mark.parametrize("backend", ["local", pytest.param("slurm", marks=needs_slurm)])
@pytest.mark.slow
def test_the_stage_in_jobs_makes_what_one_process_makes(backend, request, root, dump, tmp_path):  # noqa: F811
    for table in ("wav.scp", "utt2num_samples", "utt2spk"):  # each recording ten times: more than one batch
        lines = (dump / "train" / table).read_text().splitlines()
        (dump / "train" / table).write_text("".join(f"{i}-{line}\n" for line in lines for i in range(10)))
    (dump / "train/phones.ctm").unlink()
    env = request.getfixturevalue("cluster").environment if backend == "slurm" else dict(os.environ)
    env |= {"cmd_backend": backend, "ESPNET_MAMBA_NO_SETUP": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    env |= {"ESPNET_MAMBA_VENV": sys.prefix}
    options = {"stage": "targets1", "stop_stage": "targets1", "dumpdir": dump.parent, "expdir": tmp_path / "exp"}
    options |= {"num_clusters1": 6, "kmeans_frames": 300, "nj": 1, "targets_nj": 2}
    options |= {"job_args": "--poll_seconds 1 --mem 500M"} if backend == "slurm" else {}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    run = [str(root / "egs2/mini/ssl1/run.sh"), *words]
    first = subprocess.run(run, capture_output=True, text=True, env=env)
    assert first.returncode == 0, first.stdout + first.stderr
    out = tmp_path / "exp/targets_mini_it1"
    assert f"label: 2 jobs; log: {out}/log/label.SHARD__.log" in first.stdout and "no_silence" not in first.stderr
    assert "label train 2/2: 0.0" in (out / "log/label.2.log").read_text()
    make_targets(dump, tmp_path / "here", ("train", "dev"), TargetOptions("mfcc100", 0, 6, max_frames=300))
    for name in ("train.npy", "train.tsv", "dev.npy", "dev.tsv", "quality.json"):
        assert (out / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert np.load(out / "train.npy").dtype == np.uint16 and json.loads((out / "quality.json").read_text())["sets"]
    again = subprocess.run([*run, "--targets_nj", "5"], capture_output=True, text=True, env=env)
    assert again.returncode == 0 and "skipped" in again.stdout, again.stdout  # the number of jobs changes nothing


@needs_slurm
def test_a_killed_element_of_the_array_is_named_and_done_alone(cluster, root, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    for name, value in (cluster.environment | {"PYTHONPATH": str(root)}).items():
        monkeypatch.setenv(name, value)
    launcher = [*LAUNCHER[:-4], "--backend", "slurm", "--config", str(root / "conf/slurm.conf"), "--poll_seconds", "1"]
    (tmp_path / "fail").touch()
    with pytest.raises(StepFailedError, match="label: 1 of 3 shards are not finished") as caught:
        run_fake(tmp_path, launcher)
    assert f"shard 2: log: {tmp_path}/log/label.2.log; alone: bash job.sh --step label --shard 2/3" in str(caught.value)
    assert "job 2: killed (signal 9)" in capfd.readouterr().err
    assert "with exit status 137" in (tmp_path / "log/label.2.log").read_text()
    (tmp_path / "fail").unlink()
    run_fake(tmp_path, launcher)
    assert (tmp_path / "merge.1").exists() and (tmp_path / "done").read_text().count("sample") == 3
