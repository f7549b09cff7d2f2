"""Stage 1 of the LibriSpeech recipes: data/{train,dev,test}, fetched from OpenSLR or from an unpacked copy."""

from __future__ import annotations

import argparse

from espnet_mamba.bin.cli import run_main


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data_dir", default="data", help="where train, dev and test are written")
    parser.add_argument("--corpus_dir", help="an unpacked copy: <part>/<reader>/<chapter>/*.flac and *.trans.txt")
    parser.add_argument("--download_dir", default="downloads", help="without --corpus_dir: for archives and audio")
    parser.add_argument(
        "--mirror", default="https://www.openslr.org/resources", help="the URL below which 12/ and 31/ lie"
    )
    parser.add_argument("--remove_archives", action="store_true", help="once unpacked: halves the space in the end")
    for name in ("train", "dev", "test"):
        parser.add_argument(f"--{name}_parts", nargs="+", required=True, metavar="PART", help=f"the parts of {name}")
    parser.add_argument(
        "--speaker", choices=("reader", "chapter"), default="reader",
        help="in utt2spk: the reader, one person; or reader-chapter, as Kaldi has it",
    )  # fmt: skip
    parser.add_argument("--alignments_dir", help="of <utterance id>.TextGrid at any depth, or phones.ctm, words.ctm")
    parser.add_argument(
        "--unaligned", choices=("keep", "drop"), default="keep",
        help="where some of a set's utterances have no alignment: keep them and do without it, or drop them",
    )  # fmt: skip
    parser.add_argument("--nj", type=int, default=2, help="chapters or alignments read at a time")
    for unused in ("--minutes", "--seed"):  # the engine gives them to every recipe's local/data.sh
        parser.add_argument(unused, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Parse, fetch what is missing, and write the sets."""
    args = get_parser().parse_args()
    from pathlib import Path

    from espnet_mamba.data.librispeech import fetch_parts, find_root, prepare

    sets = {"train": args.train_parts, "dev": args.dev_parts, "test": args.test_parts}
    parts = [part for names in sets.values() for part in names]
    if args.corpus_dir:
        root = find_root(args.corpus_dir, parts)
    else:
        root = fetch_parts(parts, Path(args.download_dir), args.mirror, not args.remove_archives)
    prepare(root, args.data_dir, sets, args.speaker, args.alignments_dir, args.unaligned, args.nj)


if __name__ == "__main__":
    run_main(main)
