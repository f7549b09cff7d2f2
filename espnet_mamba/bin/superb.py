"""Train and test a SUPERB head (keywords, intents or speakers) on frozen upstreams and on filterbanks."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from espnet_mamba.bin.cli import run_main


def get_parser() -> argparse.ArgumentParser:
    """Return the options of this command."""
    parser = argparse.ArgumentParser(prog="python -m espnet_mamba.bin.superb", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="options of S3PRL's problems, conf/superb/*.yaml")
    parser.add_argument(
        "--task",
        default="auto",
        help="ks, ic, sid, or auto: ks when the sets have words.ctm, else ic when they have utt2intent, else sid "
        "(default: %(default)s)",
    )
    parser.add_argument("--dump_dir", type=Path, required=True, help="folder of checked sets, dump/raw")
    parser.add_argument("--out_dir", type=Path, required=True, help="receives data/ and one folder per system")
    parser.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="pretrained=FOLDER, random=FOLDER (upstream folders) or fbank=fbank; may be repeated",
    )
    parser.add_argument("--total_steps", type=int, help="training steps; overrides the configuration")
    parser.add_argument("--lr", type=float, help="learning rate; overrides the configuration")
    parser.add_argument("--nj", type=int, default=3, help="systems run at once (default: %(default)s)")
    return parser


def main() -> None:
    """Parse the command line, run the task, and print the accuracies."""
    args = get_parser().parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # here only lists are made; each system gets its share of the cores

    from espnet_mamba.asr.systems import parse_systems
    from s3prl_upstream.superb_run import run_systems

    options: dict = {}
    if args.total_steps is not None:
        steps = min(100, args.total_steps)  # a run shorter than an interval would never be evaluated
        options["train"] = {"total_steps": args.total_steps, "eval_step": steps, "save_step": steps, "log_step": steps}
    if args.lr is not None:
        options["build_optimizer"] = {"conf": {"lr": args.lr}}
    systems = parse_systems(args.system)
    print(run_systems(args.config, args.task, args.dump_dir, args.out_dir, systems, options, args.nj))


if __name__ == "__main__":
    run_main(main)
