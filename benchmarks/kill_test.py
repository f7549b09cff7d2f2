"""Kill -9 a small pretraining run at random points, resume each by the same command, compare with an undisturbed run.

Half of the points are random times, half lie inside a save: at a random one of all its writes, of all its syncs, or of
all its renames. Compared bit by bit: weights, optimizer, schedule and counters of the last checkpoint, both model
folders, and all lines of the log but their times. ESPnet is imported once; each run is a fork of this process.

For example: python benchmarks/kill_test.py --points 20 --output kills.md
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
TIMED = ("seconds", "audio_rate", "data_wait", "mfu")  # of a log line, beside whatever else is not in EXACT
EXACT = "step split loss loss_masked loss_info_nce loss_mse feature_penalty accuracy_masked accuracy_unmasked".split()
EXACT += ["grad_norm", "learning_rate"]
FRONT_END = [[8, 10, 5]] + [[8, 3, 2]] * 4 + [[8, 2, 2]] * 2
HUBERT = {"conv_layers": FRONT_END, "embed_dim": 16, "num_layers": 3, "state_size": 4, "expand": 2}
HUBERT |= {"position_kernel": 8, "position_groups": 4, "layer_drop": 0.3, "dropout": 0.1}
SSAMBA = {"kind": "ssamba", "embed_dim": 16, "depth": 4, "state_size": 4, "num_mel_bins": 32, "num_frames": 128}
SSAMBA |= {"mask_patches": 9, "mask_squares": [1, 3]}


def make_corpus(folder: Path, objective: str) -> None:
    """Write noise as two sets with lists, lengths and random labels, and a small model's YAML."""
    from espnet_mamba.targets.labels import write_labels

    rng = np.random.default_rng(0)
    for name, count in (("train", 12), ("dev", 4)):
        (folder / name).mkdir(parents=True)
        lists: dict[str, list[str]] = {"wav.scp": [], "utt2num_samples": []}
        labels = {}
        for i in range(count):
            utt, samples = f"{name}{i:02d}", int(rng.integers(6000, 12000))
            soundfile.write(folder / f"{utt}.wav", rng.normal(0, 0.1, samples), 16000)
            lists["wav.scp"].append(f"{utt} {folder / utt}.wav\n")
            lists["utt2num_samples"].append(f"{utt} {samples}\n")
            labels[utt] = rng.integers(0, 5, (samples - 400) // 320 + 1)
        for table, lines in lists.items():
            (folder / name / table).write_text("".join(lines))
        write_labels(folder / f"{name}.npy", labels)
    (folder / "small.yaml").write_text(yaml.safe_dump(HUBERT if objective == "hubert" else SSAMBA))


def arguments(corpus: Path, out: Path, objective: str, steps: int) -> list[str]:
    """Return the training command's options."""
    config = "tiny_it1" if objective == "hubert" else "ssamba_tiny"
    words: list[Any] = ["--config", ROOT / f"conf/pretrain/{config}.yaml", "--model", corpus / "small.yaml"]
    words += ["--ngpu", 0, "--output_dir", out, "--batch_bins", 40000, "--num_workers", 0, "--max_steps", steps]
    words += ["--num_iters_per_epoch", 8, "--save_interval_steps", 3, "--log_interval", 2]
    if objective == "hubert":
        words += ["--num_classes", 5, "--label_rate", 50]
    for split, name in (("train", "train"), ("valid", "dev")):
        words += [f"--{split}_data_path_and_name_and_type", f"{corpus}/{name}/wav.scp,speech,sound"]
        if objective == "hubert":
            words += [f"--{split}_data_path_and_name_and_type", f"{corpus}/{name}.npy,labels,frame_labels"]
        words += [f"--{split}_shape_file", f"{corpus}/{name}/utt2num_samples"]
    return [str(word) for word in words]


def train(command: list[str], objective: str) -> None:
    """Run the training command in this process."""
    from espnet_mamba.train.ssamba_task import SsambaTask
    from espnet_mamba.train.task import HubertTask

    (HubertTask if objective == "hubert" else SsambaTask).main(cmd=command)


def fork(function: Callable[[], None], log: Path) -> int:
    """Start ``function`` in a child whose output goes to ``log``; return its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        # whoever imports this may have put its own in the place of these
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        logging.getLogger().handlers.clear()
        function()
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait(pid: int) -> int:
    """Return a child's exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(kind: str = "", event: int = 0) -> dict[str, int]:
    """Count writes of a checkpoint, syncs and renames from now on; kill this process at number ``event`` of a kind.

    Returns:
        The counts by kind, which go on changing.
    """
    from espnet_mamba.train import checkpoint

    count = {"write": 0, "sync": 0, "rename": 0}

    def watched(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            count[name] += 1
            if (name, count[name]) == (kind, event):
                if name == "write":
                    original(args[0], args[1][: len(args[1]) // 2])  # a write that is cut in two
                    args[0].flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        return call

    checkpoint._Hashing.write = watched("write", checkpoint._Hashing.write)
    os.fsync, os.replace = watched("sync", os.fsync), watched("rename", os.replace)
    return count


def result(out: Path) -> dict[str, Any]:
    """Return everything that a run leaves and that may not depend on kills."""
    rows = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    folders = [out / name / "model.safetensors" for name in ("last", "valid.loss.best")]
    return {
        "log": [{key: row[key] for key in EXACT if key in row} for row in rows],
        "checkpoint": torch.load(out / "checkpoint.pth", weights_only=True),
        "folders": [path.read_bytes() for path in folders],
        "names": sorted(path.name for path in out.iterdir()),
    }


def same(a: Any, b: Any) -> bool:
    """Return whether two nested values are equal bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (a != a and b != b)  # NaN, the gradient norm of a step that was skipped


class KillTest:
    """An undisturbed run, and runs that are killed and resumed."""

    def __init__(self, work: Path, objective: str, steps: int) -> None:
        self.work, self.objective, self.steps = work, objective, steps
        make_corpus(work / "corpus", objective)
        out = work / "undisturbed"

        def counted() -> None:
            count = die_at()
            train(self.command(out), objective)
            (work / "events").write_text(json.dumps(count))

        started = time.monotonic()
        self.check(wait(fork(counted, work / "undisturbed.log")), "undisturbed")
        self.seconds, self.events = time.monotonic() - started, json.loads((work / "events").read_text())
        self.expected = result(out)

    def command(self, out: Path) -> list[str]:
        """Return the training command that writes to ``out``."""
        return arguments(self.work / "corpus", out, self.objective, self.steps)

    def check(self, status: int, name: str) -> None:
        """Raise RuntimeError unless a run ended well."""
        if status:
            raise RuntimeError(f"{name}: exit status {status}\n{(self.work / f'{name}.log').read_text()[-3000:]}")

    def kill_at_time(self, name: str, seconds: float) -> bool:
        """Kill a new run after ``seconds``; return whether it was still running."""
        command = self.command(self.work / name)
        pid = fork(lambda: train(command, self.objective), self.work / f"{name}.log")
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
        return wait(pid) == -signal.SIGKILL

    def kill_at_event(self, name: str, kind: str, event: int) -> bool:
        """Let a new run kill itself at number ``event`` of a kind (see ``die_at``); return whether it came to that."""
        command = self.command(self.work / name)

        def run() -> None:
            die_at(kind, event)
            train(command, self.objective)

        return wait(fork(run, self.work / f"{name}.log")) == -signal.SIGKILL

    def resume(self, name: str) -> tuple[int, list[str]]:
        """Give the same command again, undisturbed; return the step it went on from and what differs at its end."""
        log = self.work / f"{name}.log"
        size = log.stat().st_size
        command = self.command(self.work / name)
        self.check(wait(fork(lambda: train(command, self.objective), log)), name)
        with log.open("rb") as handle:
            handle.seek(size)
            lines = [line for line in handle.read().decode().splitlines() if "resumed from" in line]
        step = int(lines[0].rpartition(" ")[2]) if lines else 0
        found = result(self.work / name)
        found["names"] = sorted(set(found["names"]) - {"checkpoint.damaged.pth"})
        return step, [part for part in self.expected if not same(self.expected[part], found[part])]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20, help="kills, one each per run")
    parser.add_argument("--steps", type=int, default=30, help="updates of a run")
    parser.add_argument("--objective", choices=("hubert", "ssamba"), default="hubert")
    parser.add_argument("--seed", type=int, default=0, help="of the points")
    parser.add_argument("--output", type=Path, help="a Markdown file, beside the screen")
    args = parser.parse_args()
    import espnet_mamba.train.ssamba_task  # noqa: F401 -- what every fork has then

    chance, lines, failed = random.Random(args.seed), [], 0
    with tempfile.TemporaryDirectory() as folder:
        test = KillTest(Path(folder), args.objective, args.steps)
        print(f"undisturbed: {args.steps} steps in {test.seconds:.1f} s, of its saves: {test.events}")
        for number in range(args.points):
            attempt, killed = 0, False
            while not killed:  # a time may lie beyond the end of a run that was faster than the first one
                attempt += 1
                name = f"run{number}.{attempt}"
                if number % 2:
                    kind = ("write", "sync", "rename")[number // 2 % 3]
                    point = chance.randint(1, test.events[kind])
                    what, killed = f"in a save: {kind} {point}", test.kill_at_event(name, kind, point)
                else:
                    seconds = chance.uniform(0, test.seconds)
                    what, killed = f"after {seconds:.2f} s", test.kill_at_time(name, seconds)
            step, differs = test.resume(name)
            failed += bool(differs)
            verdict = f"differs: {' '.join(differs)}" if differs else "bitwise equal"
            lines.append(f"| {number + 1} | {what} | {step} | {verdict} |")
            print(lines[-1], flush=True)
    summary = f"{args.points - failed} of {args.points} killed runs ended bitwise equal to the undisturbed one"
    print(summary)
    if args.output:
        table = ["| | killed | resumed from step | at the end |", "|---|---|---|---|", *lines, "", summary, ""]
        args.output.write_text("\n".join(table), encoding="utf-8")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
