"""Jobs through a real Slurm of two emulated nodes, and the same contract on this machine alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from slurm_cluster import unavailable
from test_train import arguments, corpus, losses  # noqa: F401 (corpus is a fixture)

from espnet_mamba.recipe.jobs import Resources, parse_jobs
from espnet_mamba.recipe.slurm import refuse_running
from espnet_mamba.recipe.slurm_conf import read_slurm_conf
from espnet_mamba.recipe.slurm_script import batch_script, rc_path

ROOT = Path(__file__).resolve().parents[1]
needs_slurm = pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "there is one")


def environment(cluster=None):
    base = cluster.environment if cluster else dict(os.environ)
    return base | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(*words, backend="slurm"):
    options = ["--backend", backend, "--config", ROOT / "conf/slurm.conf", "--poll_seconds", "1"]
    return [str(word) for word in (sys.executable, "-m", "espnet_mamba.bin.run_job", *options, *words)]


def run(cluster, folder, *words, backend="slurm", **changes):
    words, env = command(*words, backend=backend), environment(cluster) | changes
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=240)


def start(cluster, folder, *words):
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    # A shell's background job, as these tests may be one, ignores Ctrl-C, and its children with it.
    hears = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(command(*words), cwd=folder, env=environment(cluster), preexec_fn=hears, **streams)


def wait_for(path, text="", seconds=120):
    deadline = time.monotonic() + seconds
    while not (path.is_file() and text in path.read_text()):
        assert time.monotonic() < deadline, f"{path} {text}"
        time.sleep(0.05)


def job_of(folder, name):
    wait_for(folder / f"q/{name}.job.json")
    return json.loads((folder / f"q/{name}.job.json").read_text())["job_id"]


SOME_FAIL = 'echo "this is JOB of $SLURM_JOB_ID"; [ JOB != 2 ] || exit 3; [ JOB != 4 ] || kill -9 $$; touch out.JOB'


@pytest.mark.parametrize("backend", ["local", pytest.param("slurm", marks=needs_slurm)])
def test_failed_jobs_are_named_and_the_others_finish(backend, request, tmp_path):
    cluster = request.getfixturevalue("cluster") if backend == "slurm" else None
    array = ["--max_jobs", 3, "JOB=1:5", "log/some.JOB.log", "bash", "-c", SOME_FAIL]
    result = run(cluster, tmp_path, *array, backend=backend)
    assert result.returncode == 1, result.stderr
    assert f"2 of 5 jobs failed: job 2: exit status 3; log: {tmp_path}/log/some.2.log" in result.stderr
    assert "job 4: killed (signal 9), most often because it went over its memory: ask for more" in result.stderr
    assert sorted(path.name for path in tmp_path.glob("out.*")) == ["out.1", "out.3", "out.5"]
    assert "this is 5 of" in (tmp_path / "log/some.5.log").read_text()


@pytest.mark.parametrize("backend", ["local", pytest.param("slurm", marks=needs_slurm)])
def test_no_more_than_max_jobs_at_a_time(backend, request, tmp_path):
    cluster = request.getfixturevalue("cluster") if backend == "slurm" else None
    inner = "mkdir alone && sleep 0.3 && rmdir alone"
    result = run(cluster, tmp_path, "--max_jobs", 1, "JOB=1:3", "log.JOB", "bash", "-c", inner, backend=backend)
    assert result.returncode == 0, result.stderr


@needs_slurm
def test_a_job_sees_its_words_its_environment_and_its_gpus(cluster, tmp_path):
    show = 'printf "%s|" "$@" "$ESPNET_MAMBA_BACKEND" "$CUDA_VISIBLE_DEVICES" "$OMP_NUM_THREADS"; echo "in $PWD"'
    words = ["--gpu", 2, "--num_threads", 3, "log.txt", "bash", "-c", show, "-", "a b", "JOB=1", "", "it's $HOME*"]
    result = run(cluster, tmp_path, *words, ESPNET_MAMBA_BACKEND="plain")
    assert result.returncode == 0, result.stderr
    assert f"a b|JOB=1||it's $HOME*|plain|0,1|3|in {tmp_path}\n" in result.stdout


@needs_slurm
def test_processes_over_nodes_know_their_rank_and_master(cluster, tmp_path):
    show = "echo $RANK $WORLD_SIZE $LOCAL_RANK $SLURMD_NODENAME $MASTER_ADDR $((MASTER_PORT > 1024))"
    result = run(cluster, tmp_path, "--num_nodes", 2, "--tasks_per_node", 2, "log", "bash", "-c", show)
    lines = [line for line in sorted(result.stdout.splitlines()) if "node-" in line and "127.0.0.1" in line]
    nodes = ["node-1", "node-1", "node-2", "node-2"]
    assert lines == [f"{i} 4 {i % 2} {node} 127.0.0.1 1" for i, node in enumerate(nodes)], result.stderr


@needs_slurm
def test_one_failing_process_ends_all(cluster, tmp_path):
    inner = "[ $RANK = 0 ] && exit 5; sleep 60"
    result = run(cluster, tmp_path, "--num_nodes", 2, "log", "bash", "-c", inner)
    assert result.returncode == 1 and "the job failed: node-1: task 0: Exited with exit code 5; log:" in result.stderr


@needs_slurm
def test_ctrl_c_cancels(cluster, tmp_path):
    for end in (signal.SIGINT, signal.SIGTERM):
        waiting = start(cluster, tmp_path, "JOB=1:2", f"{end.name}.JOB", "bash", "-c", "echo here; sleep 60")
        wait_for(tmp_path / f"{end.name}.2", "here")
        number = job_of(tmp_path, end.name)
        waiting.send_signal(end)
        assert "cancelling slurm job" in waiting.communicate(timeout=90)[0] and waiting.returncode == 130
        deadline = time.monotonic() + 90
        while set(cluster.call("squeue", "-h", "-r", "-t", "all", "-j", number, "-o", "%T").split()) != {"CANCELLED"}:
            assert time.monotonic() < deadline
            time.sleep(0.1)


@needs_slurm
def test_a_wait_that_was_killed_is_taken_up_again(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    words = ["log", "bash", "-c", "echo started >> runs; until [ -e go ]; do sleep 0.1; done; echo end"]
    waiting = start(cluster, tmp_path, *words)
    wait_for(tmp_path / "runs")
    job_of(tmp_path, "log")
    waiting.kill()
    waiting.wait()
    other = run(cluster, tmp_path, "log", "true")
    assert other.returncode == 2 and "still runs, with other options; wait for it, or: scancel" in other.stderr
    with pytest.raises(ValueError, match="slurm job .* .log. still runs"):
        refuse_running(tmp_path / "log", "log")
    (tmp_path / "go").touch()
    result = run(cluster, tmp_path, *words)
    assert result.returncode == 0 and "taken up again" in result.stdout
    assert (tmp_path / "runs").read_text() == "started\n"


RESUMES = """
n=$(cat count 2> /dev/null || echo 0); echo $((n + 1)) > count
if [ "$n" -gt 0 ]; then touch done; exit 0; fi
trap 'echo saved >> saves; exit 0' TERM USR1
echo waiting; sleep 60 & wait
"""


@needs_slurm
@pytest.mark.parametrize("how", ["preempted", "warned", "stopped"])
def test_an_interrupted_job_is_requeued_and_ends(cluster, tmp_path, how):
    waiting = start(cluster, tmp_path, "--resumable", "--done", "done", "log", "bash", "-c", RESUMES)
    wait_for(tmp_path / "log", "waiting")
    number = job_of(tmp_path, "log")
    if how == "preempted":
        cluster.call("scontrol", "requeue", number)
    elif how == "warned":  # what --signal=B:USR1 sends before the time limit
        cluster.call("scancel", "--batch", "--signal=USR1", number)
    else:  # the process alone is told to stop, as in a preemption's grace time
        cluster.call("scancel", "--signal=TERM", "--full", number)
    output = waiting.communicate(timeout=180)[0]
    assert waiting.returncode == 0, output
    assert (tmp_path / "count").read_text() == "2\n" and (tmp_path / "saves").read_text() == "saved\n"
    assert "restart 1" in (tmp_path / "log").read_text()


@needs_slurm
@pytest.mark.slow
def test_a_killed_node_gives_its_job_to_another(cluster, tmp_path):
    inner = "echo on $SLURMD_NODENAME; [ $SLURM_RESTART_COUNT ] || sleep 60"
    waiting = start(cluster, tmp_path, "log", "bash", "-c", inner)
    wait_for(tmp_path / "log", "on node-")
    first = (tmp_path / "log").read_text().split("on node-")[-1].strip()
    cluster.kill_node(f"node-{first}")
    try:
        output = waiting.communicate(timeout=180)[0]
    finally:
        cluster.start_node(f"node-{first}")
        cluster.wait_idle()
    assert waiting.returncode == 0, output
    assert f"on node-{3 - int(first)}" in (tmp_path / "log").read_text()


DDP = """
import os, sys, torch
import torch.distributed as dist
torch.manual_seed(0)
model, x = torch.nn.Linear(3, 1), torch.arange(24.0).reshape(8, 3) / 24
if "RANK" in os.environ:
    dist.init_process_group("gloo")
    x = x[dist.get_rank() :: dist.get_world_size()]
    model = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for _ in range(5):
    optimizer.zero_grad()
    (model(x) ** 2).mean().backward()
    optimizer.step()
if os.environ.get("RANK", "0") == "0":
    torch.save([p.detach() for p in model.parameters()], sys.argv[1])
"""


@needs_slurm
def test_two_nodes_give_the_result_of_one_process_with_the_whole_batch(cluster, tmp_path):
    (tmp_path / "ddp.py").write_text(DDP)
    words = [sys.executable, tmp_path / "ddp.py"]
    result = run(cluster, tmp_path, "--num_nodes", 2, "--gpu", 1, "log", *words, "two.pt")
    assert result.returncode == 0, result.stdout + result.stderr
    subprocess.run([str(word) for word in (*words, tmp_path / "one.pt")], check=True, env=environment())
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    assert all(torch.allclose(a, b, atol=1e-6, rtol=0) for a, b in zip(one, two, strict=True))


@needs_slurm
@pytest.mark.slow
@pytest.mark.espnet
def test_pretraining_on_two_nodes_requeued_ends_as_two_local_processes(cluster, corpus, root, tmp_path):  # noqa: F811
    """The preempted run saves, is started again by Slurm on both nodes, and repeats the undisturbed run's losses."""
    module, steps = "espnet_mamba.bin.hubert_train", ["--max_steps", "40", "--log_interval", "1"]
    there, here = (arguments(corpus, tmp_path / name, root, *steps, "--dist_backend", "gloo") for name in ("s", "l"))
    options = ["--num_nodes", 2, "--resumable", "--done", tmp_path / "s/last"]
    waiting = start(cluster, tmp_path, *options, "log", sys.executable, "-m", module, *there)
    wait_for(tmp_path / "s/train_log.jsonl", '"step": 6', seconds=120)
    cluster.call("scontrol", "requeue", job_of(tmp_path, "log"))
    output = waiting.communicate(timeout=400)[0]
    assert waiting.returncode == 0, output
    log = (tmp_path / "log").read_text()
    assert "restart 1" in log and "resumed from" in log, log
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", module]
    subprocess.run([*launch, *here], check=True, capture_output=True, env=environment())
    assert losses(tmp_path / "s") == losses(tmp_path / "l")


@needs_slurm
def test_a_cancelled_job_and_a_wrong_partition_are_said(cluster, tmp_path):
    waiting = start(cluster, tmp_path, "log", "sleep", "60")
    wait_for(tmp_path / "q/log.job.json")
    cluster.call("scancel", job_of(tmp_path, "log"))
    output = waiting.communicate(timeout=180)[0]
    assert waiting.returncode == 1 and "the job failed: it was cancelled; log: " in output
    (tmp_path / "slurm.conf").write_text("option gpu=* -p nowhere\noption num_threads=* -c $0\n")
    result = run(cluster, tmp_path, "--config", tmp_path / "slurm.conf", "log", "true")
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    said = ("sbatch refused", "invalid partition", "nowhere", "partitions here: debug;", f"mend {tmp_path}/slurm.conf")
    assert all(part in result.stderr for part in said), result.stderr


@pytest.mark.parametrize(
    ("status", "answers", "restarts", "again"),
    [
        (1, False, 0, True),  # a lost node takes the other node's process with it
        (1, True, 0, False),  # its own mistake
        (0, True, 0, True),  # it saved and stopped, but is not done
        (0, True, 100, False),  # for ever
    ],
)
def test_the_batch_script_knows_what_to_try_again(tmp_path, status, answers, restarts, again):
    """The script itself, with stand-ins for Slurm's commands."""
    jobs = parse_jobs([str(tmp_path / "log"), "true"], "two", resumable=True, done=[tmp_path / "done"])
    (tmp_path / "script").write_text(batch_script(jobs, Resources(num_nodes=2), tmp_path))
    rc_path(jobs, 1).parent.mkdir()
    fake = {
        "scontrol": 'echo "$@" >> calls; [ "$2" != job ] || echo "JobId=7 JobState=RUNNING Reason=None"',
        "srun": f'case "$*" in *--overlap*) exit {0 if answers else 1} ;; esac; exit {status}',
    }
    for name, body in fake.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_RESTART_COUNT": str(restarts)}
    script = (tmp_path / "script").read_text().replace("export PATH=", f"export PATH={tmp_path}:", 1)
    done = subprocess.run(["bash", "-c", script], env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert ("requeue 7" in (tmp_path / "calls").read_text()) == again, done.stdout
    assert rc_path(jobs, 1).exists() != again


def test_no_slurm_is_one_line(tmp_path):
    result = run(None, tmp_path, "log", "true", PATH=str(tmp_path))
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert "sbatch is not on this machine" in result.stderr and "cmd_backend=local" in result.stderr


def test_conf_is_read_as_kaldi_does(tmp_path):
    path = tmp_path / "slurm.conf"
    path.write_text(
        "# comment\ncommand sbatch --export=PATH\noption name=* --job-name $0\ndefault time=48:00:00\n"
        "option time=* --time $0\noption mem=* --mem-per-cpu $0\noption mem=0\noption num_threads=* -c $0\n"
        "default gpu=0\noption gpu=0 -p cpu\noption gpu=* -p gpu --gres=gpu:$0 -c $0  # more cores than GPUs\n"
    )
    conf = read_slurm_conf(path)
    assert conf.words({}) == "sbatch --export=PATH --time 48:00:00 -p cpu".split()
    given = {"gpu": "2", "mem": "0", "time": "1:0:0", "num_threads": "3"}
    assert conf.words(given) == "sbatch --export=PATH --time 1:0:0 -c 3 -p gpu --gres=gpu:2 -c 2".split()
    with pytest.raises(ValueError, match="no line for --num_nodes 2; add: option num_nodes="):
        conf.words({"num_nodes": "2"})
    path.write_text("option gpu -p x\n")
    with pytest.raises(ValueError, match=r"slurm.conf:1: 'option gpu -p x' is none of"):
        read_slurm_conf(path)


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("local", ["--num_nodes", "2"], "--num_nodes 2: cmd_backend=local is one machine; use cmd_backend=slurm"),
        ("slurm", [], "cmd_backend=slurm, but sbatch is not on this machine"),
        ("sge", [], "cmd_backend=sge is not one of: local slurm"),
    ],
    ids=["nodes", "sbatch", "sge"],
)
def test_the_recipe_refuses_what_its_backend_cannot(root, tmp_path, backend, options, message):
    for path in Path("/usr/bin").iterdir():  # all tools but Slurm's
        if path.name not in ("sbatch", "srun"):
            (tmp_path / path.name).symlink_to(path)
    env = environment() | {"cmd_backend": backend, "ESPNET_MAMBA_NO_SETUP": "1", "PATH": f"{tmp_path}:/bin.none"}
    env |= {"ESPNET_MAMBA_VENV": str(tmp_path)}
    result = subprocess.run([root / "egs2/mini/ssl1/run.sh", *options], capture_output=True, text=True, env=env)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and message in result.stderr, result.stderr


@needs_slurm
def test_a_stage_runs_as_a_job_and_is_then_done(cluster, root, tmp_path):
    """run.sh itself, with stages 1 and 2 as jobs: the records know the command, not how it was brought to a node."""
    where = ["--minutes", "2", "--expdir", tmp_path / "exp", "--datadir", tmp_path / "d", "--dumpdir", tmp_path / "u"]
    words = [root / "egs2/mini/ssl1/run.sh", *where, "--stop_stage", "check", "--nj", "2"]
    words += ["--job_args", "--poll_seconds 1 --mem 100M"]
    env = environment(cluster) | {"cmd_backend": "slurm", "ESPNET_MAMBA_NO_SETUP": "1"}
    first, second = (
        subprocess.run([str(word) for word in words], capture_output=True, text=True, env=env | changes)
        for changes in ({}, {"cmd_backend": "local"})
    )
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.count("submitted; log: ") == 2 and "stage 2 (check): finished in" in first.stdout
    assert second.stdout.count("skipped") == 2
    stages = next((tmp_path / "exp").glob("*/stages"))
    assert "# ended" in (stages / "02_check.job.log").read_text() and (stages / "q/check.1.rc").read_text() == "0\n"
    assert json.loads((stages / "02_check.json").read_text())["peak_memory_mb"] is None
