"""What a model is made of and costs: parameters by part, MACs, look-ahead, streaming state; and matching of sizes.

One model in full: --config conf/models/mamba_base.yaml. All in one table: --all. The width, depth or expand at which
one comes nearest another: --config conf/models/extbimamba_base.yaml --match transformer_base --by params.
MACs by part: --config conf/models/mamba_base.yaml conf/ssamba/ssamba_base.yaml --macs --lengths 5 10 20.
What other counters read, and what they miss: --config conf/models/mamba_base.yaml --counters --lengths 10.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from espnet_mamba.bin.cli import run_main

MODELS = Path(__file__).resolve().parents[2] / "conf" / "models"


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m espnet_mamba.bin.model_info",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", nargs="+", default=[], metavar="YAML", help="models: files, or names of models_dir")
    parser.add_argument("--all", action="store_true", help="one table of all models of models_dir")
    parser.add_argument("--models_dir", type=Path, default=MODELS, help="folder of YAMLs (conf/models)")
    parser.add_argument(
        "--match", metavar="MODEL", help="find the size at which each --config comes nearest this model"
    )
    parser.add_argument("--by", choices=["params", "macs"], default="params", help="what is to match (%(default)s)")
    parser.add_argument("--vary", choices=["width", "depth", "expand"], help="what may change (each in turn)")
    parser.add_argument(
        *("--seconds", "--lengths"),
        nargs="+",
        type=float,
        help="lengths of audio for MACs in s (5 15.6 60 320; for --match 15.6, for --counters 10)",
    )
    parser.add_argument("--macs", action="store_true", help="MACs and FLOP by part and length alone; SSAMBA's too")
    parser.add_argument(
        "--counters", action="store_true", help="run each model under PyTorch's counter and, if installed, two others"
    )
    parser.add_argument(
        "--num_classes", type=int, default=504, help="classes of the head, 0 for none; K = 500 and fairseq's 4 (504)"
    )
    return parser


def main() -> None:
    """Parse and print."""
    args = get_parser().parse_args()
    from espnet_mamba.efficiency import model_info as info
    from espnet_mamba.models.config import HubertConfig, load_config

    if args.macs or args.counters:
        print(_macs(args))
        return

    def open_model(word: str) -> HubertConfig:
        return load_config(word if word.endswith((".yaml", ".yml")) else args.models_dir / f"{word}.yaml")

    configs = [open_model(word) for word in args.config]
    if args.all:
        configs = [load_config(path) for path in sorted(args.models_dir.glob("*.yaml"))]
    if not configs:
        raise ValueError("no model; give --all, or --config conf/models/NAME.yaml")
    if args.match:
        target, lengths = open_model(args.match), args.seconds or [info.CROP_SECONDS]
        print(info.matches_table(info.match_all(configs, target, args.by, args.vary, lengths, args.num_classes)))
    elif args.all:
        lengths = args.seconds or info.SECONDS
        print(info.models_table([info.describe(c, lengths, args.num_classes) for c in configs], lengths))
    else:
        reports = [info.model_report(c, args.seconds or info.SECONDS, args.num_classes) for c in configs]
        print("\n\n".join(reports))


def _macs(args: argparse.Namespace) -> str:
    """Return the tables that are about MACs alone."""
    from espnet_mamba.efficiency import macs_counters, macs_table, model_info

    words = args.config or sorted(map(str, args.models_dir.glob("*.yaml"))) * args.all
    if not words:
        raise ValueError("no model; give --all, or --config conf/models/NAME.yaml")
    paths = [word if word.endswith((".yaml", ".yml")) else args.models_dir / f"{word}.yaml" for word in words]
    configs = [macs_table.open_config(path) for path in paths]
    if args.macs:
        return macs_table.macs_table(configs, args.seconds or model_info.SECONDS)
    return "\n\n".join(
        f"At {length:g} s\n\n{macs_counters.counters_table(configs, length)}" for length in args.seconds or [10.0]
    )


if __name__ == "__main__":
    run_main(main)
