"""Run one stage of a recipe if it is not done: the engine's hand (egs2/TEMPLATE/ssl1/ssl.sh calls it)."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from espnet_mamba.bin.cli import run_main
from espnet_mamba.recipe.runner import StageFailedError, run_stage
from espnet_mamba.recipe.table import find_stage, read_table


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", type=Path, required=True, help="stages.tsv")
    parser.add_argument("--stage", required=True, help="number or name")
    parser.add_argument("--record_dir", type=Path, help="where the stage's record, log and script go")
    parser.add_argument("--launcher", default="", help="what runs the command elsewhere: bin/run_job.py with options")
    parser.add_argument("--number", action="store_true", help="only print the stage's number")
    parser.add_argument("command", nargs="*", help="after --: the stage's command")
    args = parser.parse_args()
    table = read_table(args.table)
    stage = find_stage(table, args.stage)
    if args.number:
        print(stage.number)
        return
    try:
        run_stage(table, stage, os.environ, args.record_dir, args.command, shlex.split(args.launcher))
    except StageFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    run_main(main)
