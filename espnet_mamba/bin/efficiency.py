"""MACs, wall time and peak memory of the forward pass against the length of the audio: tables and figures."""

from __future__ import annotations

import argparse

from espnet_mamba.bin.cli import run_main


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m espnet_mamba.bin.efficiency",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--upstream", nargs="+", default=[], help="model folders")
    parser.add_argument("--config", nargs="+", default=[], help="model YAMLs; their weights are random")
    parser.add_argument("--seconds", nargs="+", type=float, default=[1, 2, 5, 10, 20], help="lengths of the audio in s")
    parser.add_argument("--repeats", type=int, default=5, help="timed passes per model and length, interleaved")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out_dir", required=True, help="folder for tables and figures")
    return parser


def main() -> None:
    """Parse and call."""
    args = get_parser().parse_args()
    from espnet_mamba.efficiency.stage import open_models, run_efficiency

    models = open_models(args.upstream, args.config)
    run_efficiency(models, args.seconds, args.repeats, args.out_dir, args.device)


if __name__ == "__main__":
    run_main(main)
