"""MACs, wall time and peak memory against the length of the audio, in eval and training: tables, figures, crossings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from espnet_mamba.bin.cli import run_main

if TYPE_CHECKING:
    from espnet_mamba.efficiency.entries import Entry
    from espnet_mamba.efficiency.peers import Peer

MODELS = Path(__file__).resolve().parents[2] / "conf" / "models"
ESPNET_PEERS = ("espnet_conformer", "espnet_e_branchformer")


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="python -m espnet_mamba.bin.efficiency",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="A run that is broken off, or given more minutes, goes on from samples.jsonl in out_dir.",
    )
    add = parser.add_argument
    add("--upstream", nargs="+", default=[], help="model folders")
    add(
        "--models",
        "--config",
        nargs="+",
        default=[],
        help="names of models_dir, YAMLs, or peers (--list_peers), with random weights; NAME:eager for plain "
        "attention, NAME:mask_per_call for the papers' causal mask; all_base, all_small: all of a size but *_paper",
    )
    add("--models_dir", type=Path, default=MODELS, help="folder of YAMLs")
    add("--list_peers", action="store_true", help="print the peers and whether each can run here, and end")
    add("--seconds", nargs="+", type=float, help="lengths of the audio in s (1 s to 1 h)")
    add("--modes", nargs="+", help="eval, train (both)")
    add("--batch_seconds", type=float, default=40.0, help="seconds of audio in a batch beside batches of one; 0: none")
    add("--repeats", type=int, default=10, help="timed calls per cell at most, interleaved over models")
    add("--least_repeats", type=int, default=3, help="what would get fewer within --minutes is left out")
    add("--warm_up", type=int, default=10, help="calls before the first timed one; fewer where calls are long")
    add("--minutes", type=float, default=10.0, help="time for everything")
    add("--memory_limit_mb", type=float, default=0.0, help="MiB that a call may add; 0: 85 %% of what is available")
    add("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's own choice")
    add("--device", default="cpu", help="cpu or cuda")
    add("--fresh", action="store_true", help="measure all anew; what an earlier run left is kept as samples.old")
    add("--no_streaming", action="store_true", help="without the cost of chunks")
    add("--seed", type=int, default=0, help="order of the models in each round")
    add("--out_dir", help="folder for tables and figures; needed unless --list_peers")
    return parser


def main() -> None:
    """Parse and call."""
    args = get_parser().parse_args()
    if not args.out_dir and not args.list_peers:
        raise ValueError("--out_dir is missing; give a folder for tables and figures")
    import torch

    from espnet_mamba.efficiency.entries import open_entries
    from espnet_mamba.efficiency.settings import LENGTHS, MODES, EfficiencySettings
    from espnet_mamba.efficiency.stage import run_efficiency

    if args.list_peers:
        open_peers(list(_all_peers(args.models_dir)), args.models_dir, args.device, say_able=True)
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    keys = ("batch_seconds", "repeats", "least_repeats", "warm_up", "minutes", "memory_limit_mb", "device", "seed")
    settings = EfficiencySettings(
        lengths=tuple(args.seconds or LENGTHS),
        modes=tuple(args.modes or MODES),
        streaming=not args.no_streaming,
        **{key: getattr(args, key) for key in keys},
    )
    words = [word for given in args.models for word in _expand(given, args.models_dir)]
    known = _all_peers(args.models_dir)
    asked = [word for word in words if word in known]
    peers = open_peers(asked, args.models_dir, args.device)
    words = [word for word in words if word not in asked or word in peers]
    entries = open_entries(args.upstream, words, args.models_dir, peers)
    samples = Path(args.out_dir) / "samples.jsonl"
    if args.fresh and samples.is_file():
        samples.replace(samples.with_suffix(".old"))
    run_efficiency(entries, settings, args.out_dir)


def open_peers(names: Sequence[str], models_dir: Path, device: str, say_able: bool = False) -> dict[str, Entry]:
    """Return the entries of those that can run here, and say of each other why not."""
    from espnet_mamba.efficiency.peers import peer_entry, refusal

    known, entries = _all_peers(models_dir), {}
    for name in names:
        reason = refusal(name, known[name], device)
        if reason:
            print(reason, flush=True)
            continue
        entries[name] = peer_entry(name, known[name], models_dir)
        if say_able:
            print(f"{name}: can run; {known[name].what}")
    return entries


def _all_peers(models_dir: Path) -> dict[str, Peer]:
    from espnet_mamba.efficiency.peers import Peer, own_peers

    def espnet(name: str) -> Peer:
        def build() -> object:  # importing ESPnet costs 10 s, so only where one is measured
            from espnet_mamba.asr import peer_encoders

            return getattr(peer_encoders, name.removeprefix("espnet_"))()

        return Peer(f"ESPnet's {name.removeprefix('espnet_')} behind HuBERT's front end", build, None, "espnet2")

    return own_peers(models_dir) | {name: espnet(name) for name in ESPNET_PEERS}


def _expand(word: str, models_dir: Path) -> list[str]:
    """Return the models of a size for all_<size>, else the word."""
    if not word.startswith("all_"):
        return [word]
    size = word.removeprefix("all")
    names = sorted(path.stem for path in models_dir.glob("*.yaml") if path.stem.endswith((size, f"{size}_matched")))
    if not names:
        raise ValueError(f"{word}: no model of {models_dir} ends in {size}; known sizes: all_base all_small all_tiny")
    return names


if __name__ == "__main__":
    run_main(main)
