"""Convert a HuBERT of fairseq, S3PRL, transformers or torchaudio to a model folder, or a Transformer of ours to theirs.

No code of a checkpoint is run; one that would is refused.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from espnet_mamba.bin.cli import run_main


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m espnet_mamba.bin.convert_checkpoint",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--source", type=Path, required=True, help="a .pt, .bin or .safetensors file, or a model folder"
    )
    parser.add_argument("--out_dir", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--to",
        choices=["espnet_mamba", "hf"],
        default="espnet_mamba",
        help="a folder of this project, or one for transformers.HubertModel.from_pretrained",
    )
    parser.add_argument(
        "--config", type=Path, help="a model YAML that the source must be, instead of what it says itself"
    )
    return parser


def main() -> None:
    """Run the command and say what was found."""
    args = get_parser().parse_args()
    from espnet_mamba.models.config import load_config
    from espnet_mamba.models.convert import convert

    config = load_config(args.config) if args.config else None
    result = convert(args.source, args.out_dir, args.to, config)
    found = result.config
    print(f"{args.source}: {result.kind}, {found.num_layers} x {found.mixer}, width {found.embed_dim}")
    for note in result.notes:
        print(f"  assumed: {note}")
    for name in result.dropped:
        print(f"  left out: {name}")
    head = " and its pretraining head" if result.has_head else ""
    print(f"{args.out_dir}: {result.num_tensors} tensors{head}, as {args.to}")


if __name__ == "__main__":
    run_main(main)
