"""The whole mini recipe through a real Slurm, all stages as jobs; the node that pretrains is killed on the way."""

import json
import subprocess

import pytest
from slurm_cluster import unavailable
from test_end_to_end import TINY
from test_slurm import environment, wait_for

pytestmark = [pytest.mark.end_to_end, pytest.mark.espnet, pytest.mark.slow]
pytestmark += [pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "there is one")]
STEPS = 30
LONGER = f"--max_steps {STEPS} --num_iters_per_epoch {STEPS} --save_interval_steps 5"
LONGER += " --batch_bins 160000 --log_interval 1"


def test_the_whole_recipe_with_a_node_killed_on_the_way(cluster, root, tmp_path):
    exp = tmp_path / "exp"
    stages, run = exp / "extbimamba_tiny_mini/stages", exp / "pretrain_extbimamba_tiny_mini_it2"
    words = [root / "egs2/mini/ssl1/run.sh", *TINY, "--minutes", 2, "--nj", 2, "--pretrain_args", LONGER]
    words += ["--expdir", exp, "--datadir", tmp_path / "data", "--dumpdir", tmp_path / "dump"]
    words += ["--job_args", "--poll_seconds 1 --mem 500M"]
    env = environment(cluster) | {"cmd_backend": "slurm", "ESPNET_MAMBA_NO_SETUP": "1"}
    with (tmp_path / "said").open("w") as said:
        recipe = subprocess.Popen([str(word) for word in words], env=env, stdout=said, stderr=subprocess.STDOUT)
    wait_for(run / "train_log.jsonl", '"step": 7', seconds=900)
    number = json.loads((stages / "q/pretrain2.job.json").read_text())["job_id"]
    node = cluster.call("squeue", "-h", "-j", str(number), "-o", "%N").strip()
    cluster.kill_node(node)
    log = stages / "06_pretrain2.job.log"
    wait_for(log, "restart 1", seconds=120)
    cluster.start_node(node)
    assert recipe.wait(900) == 0, (tmp_path / "said").read_text()[-4000:]
    assert (tmp_path / "said").read_text().count("submitted; log: ") >= 13
    assert f"node {node}" in log.read_text() or node in log.read_text()
    assert "resumed from" in log.read_text(), log.read_text()
    rows = map(json.loads, (run / "train_log.jsonl").read_text().splitlines())
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, STEPS + 1))
    records = [json.loads(path.read_text()) for path in sorted(stages.glob("*.json"))]
    assert len(records) == 13 and {record["status"] for record in records} == {"done"}
    results = (exp / "extbimamba_tiny_mini/RESULTS.md").read_text()
    assert all(name in results for name in ("pretrained", "random", "fbank"))
