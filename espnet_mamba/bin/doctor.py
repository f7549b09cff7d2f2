"""What this machine offers: versions, devices, kernels of scan and convolution, disk; and what a run will take."""

from __future__ import annotations

import argparse
from pathlib import Path

from espnet_mamba.bin.cli import run_main


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m espnet_mamba.bin.doctor",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="a model's YAML: forecast its pretraining")
    parser.add_argument("--pretrain_config", type=Path, help="a YAML of conf/pretrain: batches and updates of that run")
    parser.add_argument("--corpus", type=Path, help="a checked set, such as dump/raw/train: its hours and lengths")
    parser.add_argument("--ngpu", type=int, help="GPUs of that run, 0 for the CPU; by default those of this machine")
    parser.add_argument(
        "--peak_tflops", type=float, default=312.0, help="of such a GPU if none is here (A100, bfloat16)"
    )
    parser.add_argument("--mfu", type=float, default=0.25, help="share of that peak that training is assumed to use")
    return parser


def main() -> None:
    """Print a line per finding."""
    args = get_parser().parse_args()
    if (args.config is None) != (args.pretrain_config is None):
        raise ValueError("a forecast needs both --config (a model's YAML) and --pretrain_config (a run's YAML)")
    from espnet_mamba.doctor import describe, predict

    lines = describe()
    if args.config:
        lines += predict(
            args.config, args.pretrain_config, args.corpus, ngpu=args.ngpu, peak_tflops=args.peak_tflops, mfu=args.mfu
        )
    for what, finding in lines:
        print(f"{what:34}{finding}")


if __name__ == "__main__":
    run_main(main)
