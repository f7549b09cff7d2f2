"""Export a pretrained model as an S3PRL upstream, with its random control, and check both (stage 7)."""

from __future__ import annotations

import argparse
from pathlib import Path

from espnet_mamba.bin.cli import run_main


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="a model folder that pretraining wrote")
    parser.add_argument("--out_dir", type=Path, required=True, help="the upstream to write")
    parser.add_argument("--random_dir", type=Path, help="also write the same model with random weights here")
    parser.add_argument("--check_set", type=Path, help="a checked set whose first recordings both are tried on")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    return parser


def main() -> None:
    """Run the command."""
    args = get_parser().parse_args()
    from espnet_mamba.models.folders import export_upstream

    model = export_upstream(args.model_dir, args.out_dir, args.random_dir, args.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.out_dir}: {parameters} parameters, look-ahead {model.look_ahead_ms:g} ms")
    if args.check_set:
        from espnet_mamba.data.manifest import read_manifest
        from s3prl_upstream.check import check_upstream

        wavs = [Path(utterance.path) for utterance in read_manifest(args.check_set)[:3]]
        for folder in filter(None, (args.out_dir, args.random_dir)):
            print(f"{folder}: {check_upstream(folder, wavs)}")


if __name__ == "__main__":
    run_main(main)
