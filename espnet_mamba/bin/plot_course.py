"""Loss, masked accuracy and layer purity against the steps of pretraining, for some runs: one figure, its numbers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from espnet_mamba.bin.cli import run_main


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m espnet_mamba.bin.plot_course",
        description=__doc__,
        epilog="Models to measure over the steps are kept by pretraining's --keep_interval_steps N (folders step_N); "
        "their purity is measured by espnet_mamba.bin.analyse with conf/analysis/purity.yaml and "
        "--system RUN@STEP=FOLDER for each.",
    )
    parser.add_argument(
        "--run", required=True, action="append", metavar="NAME=FOLDER", help="a run with its train_log.jsonl; repeat"
    )
    parser.add_argument("--purity", action="append", default=[], metavar="CSV", help="purity.csv of an analysis")
    parser.add_argument("--out", required=True, type=Path, help="path of the figure without suffix: .svg .png .csv")
    return parser


def main() -> None:
    """Parse and call."""
    args = get_parser().parse_args()
    from espnet_mamba.analysis.course import plot_course, purity_of_steps
    from espnet_mamba.analysis.table import read_table_csv

    logs = {}
    for run in args.run:
        name, separator, folder = run.partition("=")
        if not (name and separator and folder):
            raise ValueError(f"--run {run!r}: expected NAME=FOLDER, such as mamba=exp/pretrain_mamba_tiny_mini_it1")
        path = Path(folder) / "train_log.jsonl"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: not there; pretraining (stages 4 and 6) writes it")
        logs[name] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    purity = purity_of_steps([row for path in args.purity for row in read_table_csv(path)]) if args.purity else []
    unknown = sorted({row.run for row in purity} - set(logs))
    if unknown:
        raise ValueError(f"--purity: runs {' '.join(unknown)} are not given as --run; known: {' '.join(logs)}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for path in plot_course(logs, purity, args.out):
        print(path, flush=True)


if __name__ == "__main__":
    run_main(main)
