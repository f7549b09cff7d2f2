"""Cluster frames and label a corpus with them: what pretraining predicts (stages 3 and 5)."""

from __future__ import annotations

import argparse
from pathlib import Path

from espnet_mamba.bin.cli import run_main


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dump_dir", type=Path, required=True, help="checked data, one folder per set")
    parser.add_argument("--out_dir", type=Path, required=True, help="where labels, centroids and quality.json go")
    parser.add_argument("--sets", nargs="+", default=["train", "dev"], help="sets to label; the first one is fitted on")
    parser.add_argument("--features", default="mfcc100", help="mfcc100 | mfcc | logmel | a model folder")
    parser.add_argument("--layer", type=int, default=0, help="layer of the model; 0 for spectral features")
    parser.add_argument("--num_clusters", type=int, default=100, help="K")
    parser.add_argument("--max_frames", type=int, default=500_000, help="frames held in memory to fit on")
    parser.add_argument("--num_iterations", type=int, default=50, help="most Lloyd iterations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_shards", type=int, default=2, help="threads of the fit; does not change the result")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for a model's features")
    return parser


def main() -> None:
    """Run the command."""
    args = vars(get_parser().parse_args())
    dump_dir, out_dir, sets = args.pop("dump_dir"), args.pop("out_dir"), args.pop("sets")
    from espnet_mamba.targets.pipeline import TargetOptions, make_targets
    from espnet_mamba.targets.summary import format_quality

    result = make_targets(dump_dir, out_dir, sets, TargetOptions(**args))
    print(format_quality(result))


if __name__ == "__main__":
    run_main(main)
