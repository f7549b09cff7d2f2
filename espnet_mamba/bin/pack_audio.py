"""Copy the audio of checked sets into uncompressed tar shards; wav.scp then says shard.tar:offset:length.

Run it between the stages 2 (check) and 3: small files are what slows a file server down. What reads audio here reads
the shards by byte offset, nothing is unpacked; tar -xf unpacks them for other programs. Rerunning stage 2 leads back to
the files. A killed run goes on where it was.
"""

from __future__ import annotations

import argparse

from espnet_mamba.bin.cli import run_main


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dump_dir", default="dump/raw", help="folder of the checked sets")
    parser.add_argument("--sets", nargs="+", default=["train", "dev", "test"], help="names of the sets")
    parser.add_argument("--shard_dir", default="dump/shards", help="where the shards go, a folder for each set")
    parser.add_argument("--shard_mb", type=float, default=1000.0, help="size of a shard in 10^6 bytes, at most")
    parser.add_argument("--nj", type=int, default=2, help="recordings copied at a time")
    return parser


def main() -> None:
    """Parse and pack."""
    args = get_parser().parse_args()
    from espnet_mamba.data.pack import pack_sets

    pack_sets(args.dump_dir, args.sets, args.shard_dir, args.shard_mb, args.nj)


if __name__ == "__main__":
    run_main(main)
