"""Test every estimator of mutual information on data whose answer is known: a table (CSV, Markdown) and a figure."""

from __future__ import annotations

import argparse

from espnet_mamba.bin.cli import run_main


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(prog="python -m espnet_mamba.bin.calibrate", description=__doc__)
    parser.add_argument("--out_dir", required=True, help="folder for tables and figure; a stopped run goes on there")
    parser.add_argument("--quick", action="store_true", help="small data and short training: seconds, to see it run")
    parser.add_argument("--frames", type=int, help="frames of each data set (12000)")
    parser.add_argument("--utts", type=int, help="utterances that they make, of equal length (40)")
    parser.add_argument("--dims", type=int, nargs="+", help="widths of the Gaussians (1 20 768)")
    parser.add_argument("--seeds", type=int, help="critics per held-out estimator (5); coverage takes one")
    parser.add_argument("--coverage_seeds", type=int, help="data sets behind the coverage (20)")
    parser.add_argument("--first_seed", type=int, help="seed of the first of them; the next ones follow (1000)")
    parser.add_argument(
        "--sections", nargs="+", help="which of: gaussians scaling chain folded memory codes coverage (all)"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch (1)")
    return parser


def main() -> None:
    """Parse and call."""
    args = get_parser().parse_args()
    from dataclasses import replace

    import torch

    from espnet_mamba.analysis.calibration import CalibrationSettings, calibrate
    from espnet_mamba.analysis.calibration_report import write_calibration

    torch.set_num_threads(args.threads)
    settings = CalibrationSettings()
    if args.quick:
        settings = settings.quick()
    for name in ("frames", "utts", "dims", "coverage_seeds", "first_seed", "sections"):
        value = getattr(args, name)
        if value is not None:
            settings = replace(settings, **{name: tuple(value) if isinstance(value, list) else value})
    if args.seeds is not None:
        settings = replace(settings, bounds=replace(settings.bounds, seeds=args.seeds))
    rows = calibrate(settings, args.out_dir)
    print(write_calibration(rows, args.out_dir))


if __name__ == "__main__":
    run_main(main)
