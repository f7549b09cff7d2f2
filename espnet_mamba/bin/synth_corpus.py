"""Make the mini recipe's spoken corpus with espeak-ng: commands, intents and true times of phones and words."""

from __future__ import annotations

import argparse

from espnet_mamba.bin.cli import run_main


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out_dir", default="data", help="where train, dev and test are written")
    parser.add_argument("--minutes", type=float, default=25.0, help="speech in all three sets together")
    parser.add_argument("--num_voices", type=int, default=20, help="5 to 24; of ten, seven train, one dev, two test")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other sentences and noise")
    parser.add_argument("--nj", type=int, default=2, help="helper processes; the result does not depend on it")
    return parser


def main() -> None:
    """Parse and make the corpus."""
    args = get_parser().parse_args()
    from espnet_mamba.data.synth.corpus import make_corpus

    make_corpus(args.out_dir, args.minutes, args.num_voices, args.seed, args.nj)


if __name__ == "__main__":
    run_main(main)
