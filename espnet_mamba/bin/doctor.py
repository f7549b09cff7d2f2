"""What this machine offers: versions, devices, and which kernels will serve the scan and the convolution."""

from __future__ import annotations

import argparse

from espnet_mamba.bin.cli import run_main


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options: there are none but --help."""
    return argparse.ArgumentParser(prog="python -m espnet_mamba.bin.doctor", description=__doc__)


def main() -> None:
    """Print a line per finding."""
    get_parser().parse_args()
    from espnet_mamba.doctor import describe

    for what, finding in describe():
        print(f"{what:34}{finding}")


if __name__ == "__main__":
    run_main(main)
