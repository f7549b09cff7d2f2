"""Score one Kaldi-style text against another: WER, CER, kinds of error, 95 % intervals over utterances."""

from __future__ import annotations

import argparse
from pathlib import Path

from espnet_mamba.bin.cli import run_main


def get_parser() -> argparse.ArgumentParser:
    """Return the options of this command."""
    parser = argparse.ArgumentParser(prog="python -m espnet_mamba.bin.asr_score", description=__doc__)
    parser.add_argument("--ref", type=Path, required=True, help="reference text, 'utterance words' a line")
    parser.add_argument("--hyp", type=Path, required=True, help="hypotheses; an absent one counts as empty")
    parser.add_argument("--out_dir", type=Path, required=True, help="receives score.json and errors.tsv")
    return parser


def main() -> None:
    """Parse the command line, score, and print the table."""
    args = get_parser().parse_args()
    from espnet_mamba.asr.decoding import score_text

    print(score_text(args.ref, args.hyp, args.out_dir))


if __name__ == "__main__":
    run_main(main)
