"""Import a folder {train,dev,test}/{wav.scp,text,utt2spk[,phones.ctm][,words.ctm][,utt2intent][,utt2emotion]}."""

from __future__ import annotations

import argparse

from espnet_mamba.bin.cli import run_main


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--corpus_dir", required=True, help="paths in wav.scp are relative to it, or absolute")
    parser.add_argument("--data_dir", default="data", help="where the sets are written")
    parser.add_argument("--sets", nargs="+", default=["train", "dev", "test"], help="names of the sets")
    return parser


def main() -> None:
    """Parse and import."""
    args = get_parser().parse_args()
    from espnet_mamba.data.import_folder import import_folder

    import_folder(args.corpus_dir, args.data_dir, args.sets)


if __name__ == "__main__":
    run_main(main)
