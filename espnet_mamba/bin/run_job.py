"""Run a command, or an array of JOB=1:n of it, here or through Slurm, and wait: as run.pl and slurm.pl do."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from espnet_mamba.bin.cli import run_main
from espnet_mamba.recipe.jobs import JobsFailedError, Resources, parse_jobs
from espnet_mamba.recipe.local_jobs import run_local
from espnet_mamba.recipe.slurm import run_slurm
from espnet_mamba.recipe.slurm_conf import read_slurm_conf


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(prog="python -m espnet_mamba.bin.run_job", description=__doc__, allow_abbrev=False)
    parser.add_argument("--backend", choices=("local", "slurm"), default="local")
    parser.add_argument("--config", type=Path, default=Path("conf/slurm.conf"), help="what the options ask Slurm for")
    parser.add_argument("--name", help="of the jobs; by default the log's first word")
    parser.add_argument("--gpu", type=int, default=0, help="GPUs per node")
    parser.add_argument("--mem", default="", help="memory, e.g. 4G")
    parser.add_argument("--time", default="", help="time limit, e.g. 1-00:00:00")
    parser.add_argument("--num_threads", type=int, default=1, help="cores per process")
    parser.add_argument("--num_nodes", type=int, default=1, help="machines per job")
    parser.add_argument("--tasks_per_node", type=int, default=1, help="processes per machine, started by srun")
    parser.add_argument("--max_jobs", "--max-jobs-run", type=int, default=0, help="jobs at a time; 0: no limit")
    parser.add_argument("--resumable", action="store_true", help="run again it goes on: requeue it when interrupted")
    parser.add_argument("--done", type=Path, action="append", default=[], help="a file that a whole run leaves")
    parser.add_argument("--poll_seconds", type=float, default=10.0, help="between questions to Slurm")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="[JOB=1:n] log.JOB command ...")
    return parser


def main() -> None:
    """Run the command."""
    args = get_parser().parse_args()
    words = args.words[1:] if args.words[:1] == ["--"] else args.words
    log = next((word for word in words if "=" not in word), "job")
    jobs = parse_jobs(words, args.name or Path(log).name.split(".")[0], args.resumable, args.done)
    resources = Resources(
        args.gpu, args.mem, args.time, args.num_threads, args.num_nodes, args.tasks_per_node, args.max_jobs
    )
    signal.signal(signal.SIGTERM, _interrupt)  # the recipe's Ctrl-C arrives as SIGTERM
    try:
        if args.backend == "local":
            run_local(jobs, resources)
        else:
            run_slurm(jobs, resources, read_slurm_conf(args.config), args.poll_seconds)
    except JobsFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    run_main(main)
