"""What each layer of some systems knows: mutual information, purity, CCA, probes, reconstruction: tables, figures."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from espnet_mamba.bin.cli import run_main

if TYPE_CHECKING:
    from espnet_mamba.targets.features import FeatureSource


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m espnet_mamba.bin.analyse",
        description=__doc__,
        epilog="Papers say 'local feature' and mean different points; 'references' in the settings names those that "
        "layers are measured with: layer0 is what enters block 1 (what paper 1's code takes), conv the front end's "
        "convolution output before its norm and projection (what the work that it cites takes), logmel the log-mel "
        "energies of the audio (the same for every system, so the one to compare systems by). A run that was killed "
        "goes on: systems that are finished stand in OUT_DIR/parts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="analysis settings, such as conf/analysis/mini.yaml")
    parser.add_argument("--dump_dir", required=True, help="folder of the checked sets, such as dump/raw")
    parser.add_argument("--train_set", required=True, help="set that k-means is fitted on")
    parser.add_argument("--test_set", required=True, help="set that everything is measured on")
    parser.add_argument(
        "--system",
        required=True,
        action="append",
        metavar="NAME=SPEC",
        help="a system and where it comes from: a model folder, logmel, s3prl:NAME[:PATH] or asr:FOLDER (a recogniser, "
        "its encoder layers); give it once per system",
    )
    parser.add_argument("--out_dir", required=True, help="folder for tables and figures")
    parser.add_argument("--max_utterances", type=int, help="at most this many utterances of each set (config's value)")
    parser.add_argument("--keep_features", metavar="DIR", help="keep all frames here as .safetensors (config's value)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every draw")
    return parser


def main() -> None:
    """Parse and call."""
    args = get_parser().parse_args()
    systems: dict[str, str] = {}
    for system in args.system:
        name, separator, spec = system.partition("=")
        if not (name and separator and spec):
            raise ValueError(
                f"--system {system!r}: expected NAME=SPEC, such as pretrained=exp/upstream or fbank=logmel"
            )
        if name in systems:
            raise ValueError(f"--system {name}: given twice; give every system its own name")
        systems[name] = spec

    from espnet_mamba.analysis.settings import load_settings
    from espnet_mamba.analysis.stage import run_analysis

    settings = load_settings(args.config)
    if args.max_utterances is not None:
        settings = replace(settings, max_utterances=args.max_utterances)
    if args.keep_features is not None:
        settings = replace(settings, keep_features=args.keep_features)
    sets = (args.train_set, args.test_set)
    run_analysis(settings, args.dump_dir, sets, systems, args.out_dir, args.seed, open_source)


def open_source(spec: str) -> FeatureSource:
    """Open a system by its kind; importing S3PRL or ESPnet costs 10 s, so only where it is named."""
    from espnet_mamba.targets.features import open_features

    if spec.startswith("s3prl:"):
        from s3prl_upstream.features import open_s3prl

        return open_s3prl(spec)
    if spec.startswith("asr:"):
        from espnet_mamba.asr.features import open_asr

        return open_asr(spec)
    return open_features(spec)


if __name__ == "__main__":
    run_main(main)
