"""Cluster frames and label a corpus with them: what pretraining predicts (stages 3 and 5).

Everything in one process; or, with --nj n --launcher "...", as jobs; or one step of one shard, as such a job does it.
The same labels come out, to the last bit, for any number of jobs and threads.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path
from typing import Any

from espnet_mamba.bin.cli import run_main
from espnet_mamba.recipe.sharded import STEPS, StepFailedError, run_steps

HERE = ("step", "shard", "nj", "launcher")  # options that say what is done where, not what comes out


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m espnet_mamba.bin.make_targets",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--dump_dir", type=Path, required=True, help="checked data, one folder per set")
    parser.add_argument("--out_dir", type=Path, required=True, help="where labels, centroids and quality.json go")
    parser.add_argument("--sets", nargs="+", default=["train", "dev"], help="sets to label; the first one is fitted on")
    parser.add_argument("--features", default="mfcc100", help="mfcc100 | mfcc | logmel | a model folder")
    parser.add_argument("--layer", type=int, default=0, help="layer of the model; 0 for spectral features")
    parser.add_argument("--num_clusters", type=int, default=100, help="K")
    parser.add_argument("--max_frames", type=int, default=500_000, help="frames held in memory to fit on")
    parser.add_argument("--num_iterations", type=int, default=50, help="most Lloyd iterations on all those frames")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_threads", type=int, help="of each process; by default as PyTorch has it")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for a model's features")
    parser.add_argument("--nj", type=int, default=1, help="jobs that share the corpus; more than one with --launcher")
    parser.add_argument(
        "--launcher", default="", help='what runs jobs: "python -m espnet_mamba.bin.run_job --backend .."'
    )
    parser.add_argument("--step", choices=("all", *STEPS), default="all", help="do one only, for --nj jobs in all")
    parser.add_argument("--shard", help="with --step sample or label: i/n, the part of job i of n")
    return parser


def main() -> None:
    """Run the command."""
    parser = get_parser()
    args = vars(parser.parse_args())
    given = dict(args)
    step, shard, count, launcher = (args.pop(name) for name in HERE)
    dump_dir, out_dir, sets = args.pop("dump_dir"), args.pop("out_dir"), args.pop("sets")
    if (step in ("sample", "label")) != bool(shard):
        parser.error("--shard i/n goes with --step sample and --step label, and they with it")
    if count < 1 or step == "all" and (count > 1) != bool(launcher):
        parser.error(f"--nj {count}: jobs need a --launcher, and at least 2 of them")
    from espnet_mamba.targets.pipeline import TargetOptions, TargetSteps, make_targets
    from espnet_mamba.targets.shards import parse_shard
    from espnet_mamba.targets.summary import format_quality

    options = TargetOptions(**args)
    if step == "all" and not launcher:
        print(format_quality(make_targets(dump_dir, out_dir, sets, options)))
        return
    part = parse_shard(shard) if shard else None
    steps = TargetSteps(dump_dir, out_dir, sets, options, part.count if part else count)
    if step == "all":
        _run_jobs(shlex.split(launcher), _words(given), steps)
    elif part:
        (steps.sample if step == "sample" else steps.label)(part)
    elif step == "fit":
        steps.fit()
    else:
        print(format_quality(steps.merge()))


def _run_jobs(launcher: list[str], words: list[str], steps: Any) -> None:
    """Run all steps as jobs, and print what came out."""
    from espnet_mamba.data.files import read_json
    from espnet_mamba.targets.summary import format_quality

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)  # the recipe's Ctrl-C arrives as SIGTERM
    command = [sys.executable, "-m", "espnet_mamba.bin.make_targets", *words]
    try:
        run_steps(launcher, command, steps.count, steps.out_dir.absolute() / "log", steps.pending)
    except StepFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
    print(format_quality(read_json(steps.out_dir / "quality.json")))


def _words(given: dict[str, Any]) -> list[str]:
    """Return the options that every job is given."""
    words = []
    for name, value in given.items():
        if name not in HERE and value is not None:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return words


if __name__ == "__main__":
    run_main(main)
