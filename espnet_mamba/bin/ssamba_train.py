"""Pretrain an SSAMBA model. Takes ESPnet's options: --help lists them, --config reads a YAML."""

from __future__ import annotations

from espnet_mamba.bin.cli import run_main


def main() -> None:
    """Run the command."""
    from espnet_mamba.train.ssamba_task import SsambaTask

    SsambaTask.main()


if __name__ == "__main__":
    run_main(main)
