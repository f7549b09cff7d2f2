"""Stage 2: check every recording and table of data/<set> and write dump/raw/<set>."""

from __future__ import annotations

import argparse

from espnet_mamba.bin.cli import run_main


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    tables = "wav.scp,text,utt2spk[,phones.ctm][,words.ctm][,utt2intent][,utt2emotion]"
    parser.add_argument("--data_dir", required=True, help=f"folder of the raw sets, each with {{{tables}}}")
    parser.add_argument("--dump_dir", default="dump/raw", help="where the checked sets are written")
    parser.add_argument("--sets", nargs="+", default=["train", "dev", "test"], help="names of the sets")
    parser.add_argument(
        "--bad_audio",
        choices=("refuse", "skip"),
        default="refuse",
        help="refuse: list all bad items and write nothing; skip: leave them out and list them in rejected.tsv",
    )
    parser.add_argument("--min_samples", type=int, default=1040, help="shortest recording (1040 = 65 ms)")
    parser.add_argument("--nj", type=int, default=2, help="files decoded at a time")
    parser.add_argument(
        "--shard_dir", help="copy the checked audio into tar shards there (bin/pack_audio.py); default: no"
    )
    parser.add_argument("--shard_mb", type=float, default=1000.0, help="size of a shard in 10^6 bytes, at most")
    return parser


def main() -> None:
    """Parse and check."""
    args = get_parser().parse_args()
    from espnet_mamba.data.check import check_sets
    from espnet_mamba.data.pack import pack_sets

    check_sets(args.data_dir, args.dump_dir, args.sets, args.bad_audio, args.nj, args.min_samples)
    if args.shard_dir:
        pack_sets(args.dump_dir, args.sets, args.shard_dir, args.shard_mb, args.nj)


if __name__ == "__main__":
    run_main(main)
