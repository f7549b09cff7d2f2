"""Pretrain an SSAMBA model. Takes ESPnet's options: --help lists them, --config reads a YAML."""

from __future__ import annotations

from espnet_mamba.bin.cli import imports_without, run_main


def main() -> None:
    """Run the command."""
    with imports_without("transformers"):  # seconds, for ESPnet's adapters, which pretraining refuses
        from espnet_mamba.train.ssamba_task import SsambaTask

    SsambaTask.main()


if __name__ == "__main__":
    run_main(main)
