"""Decode a test set with the trained recognisers and score it: WER, CER, intervals, and pretrained against random."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from espnet_mamba.bin.cli import run_main


def get_parser() -> argparse.ArgumentParser:
    """Return the options of this command."""
    parser = argparse.ArgumentParser(prog="python -m espnet_mamba.bin.asr_decode", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="decoding configuration, conf/asr/decode.yaml")
    parser.add_argument("--dump_dir", type=Path, required=True, help="folder of checked sets, dump/raw")
    parser.add_argument("--test_set", default="test", help="default: %(default)s")
    parser.add_argument("--asr_dir", type=Path, required=True, help="what asr_train wrote")
    parser.add_argument("--system", action="append", default=[], help="default: every system in asr_dir")
    parser.add_argument("--beam_size", type=int, help="overrides the configuration")
    parser.add_argument("--ctc_weight", type=float, help="overrides the configuration")
    parser.add_argument("--asr_model_file", help="overrides the configuration")
    parser.add_argument("--nj", type=int, default=3, help="processes at once (default: %(default)s)")
    return parser


def main() -> None:
    """Parse the command line, decode, and print the scores."""
    args = get_parser().parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per system: more would only wait for each other

    from espnet_mamba.asr.decoding import decode_systems

    names = ("beam_size", "ctc_weight", "asr_model_file")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    print(decode_systems(args.config, args.dump_dir, args.test_set, args.asr_dir, args.system, options, args.nj))


if __name__ == "__main__":
    run_main(main)
