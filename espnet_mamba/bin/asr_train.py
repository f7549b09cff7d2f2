"""Train recognisers on frozen upstreams and on filterbanks, with one set of tokens and one configuration."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from espnet_mamba.bin.cli import run_main


def get_parser() -> argparse.ArgumentParser:
    """Return the options of this command; others are passed to ESPnet."""
    parser = argparse.ArgumentParser(
        prog="python -m espnet_mamba.bin.asr_train",
        description=__doc__,
        epilog="Any other --option VALUE is ESPnet's and overrides the configuration, such as --max_epoch 10 or "
        "--optim_conf '{lr: 0.001}'.",
    )
    parser.add_argument("--config", type=Path, required=True, help="training configuration, conf/asr/*.yaml")
    parser.add_argument("--dump_dir", type=Path, required=True, help="folder of checked sets, dump/raw")
    parser.add_argument("--train_set", default="train", help="default: %(default)s")
    parser.add_argument("--valid_set", default="dev", help="default: %(default)s")
    parser.add_argument("--out_dir", type=Path, required=True, help="receives tokens/ and one folder per system")
    parser.add_argument(
        "--system",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="pretrained=FOLDER, random=FOLDER (upstream folders) or fbank=logmel; may be repeated",
    )
    parser.add_argument("--nbpe", type=int, default=60, help="sentencepiece vocabulary (default: %(default)s)")
    parser.add_argument("--nj", type=int, default=3, help="systems trained at once (default: %(default)s)")
    return parser


def parse_options(rest: list[str]) -> dict[str, Any]:
    """Return ESPnet's options from ``--name value`` and ``--name=value`` arguments, values read as YAML."""
    import yaml

    words = [part for word in rest for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if len(words) % 2 or any(not name.startswith("--") for name in words[::2]):
        raise ValueError(f"{' '.join(rest)}: write each further option as --name value")
    return {name[2:]: yaml.safe_load(value) for name, value in zip(words[::2], words[1::2], strict=True)}


def main() -> None:
    """Parse the command line and train."""
    args, rest = get_parser().parse_known_args()
    options = parse_options(rest)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per system: more would only wait for each other

    from espnet_mamba.asr.systems import parse_systems
    from espnet_mamba.asr.training import train_systems

    systems = parse_systems(args.system)
    train_systems(
        args.config, args.dump_dir, args.train_set, args.valid_set, args.out_dir, systems, args.nbpe, options, args.nj
    )


if __name__ == "__main__":
    run_main(main)
