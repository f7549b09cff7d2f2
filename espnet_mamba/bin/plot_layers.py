"""Overlay the analyses of several runs: a figure per measure, estimator and reference, and an overview."""

from __future__ import annotations

import argparse

from espnet_mamba.bin.cli import run_main


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(prog="python -m espnet_mamba.bin.plot_layers", description=__doc__)
    parser.add_argument("tables", nargs="+", metavar="CSV", help="tables that stage 11 (analysis) wrote, of any runs")
    parser.add_argument("--out_dir", required=True, help="folder for figures (SVG, PNG) and their numbers (CSV)")
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        help="name of a run, once per table in their order; used where runs share a system (part of the path)",
    )
    parser.add_argument("--measure", action="append", default=[], help="draw this measure; may be repeated (all)")
    parser.add_argument(
        "--relative_depth",
        action="store_true",
        help="layers as shares of each system's last one, for systems of different depth (layer numbers)",
    )
    return parser


def main() -> None:
    """Parse and call."""
    args = get_parser().parse_args()
    from espnet_mamba.analysis.layer_plots import plot_layers
    from espnet_mamba.analysis.overview import overview_kinds, plot_overview
    from espnet_mamba.analysis.runs import read_runs

    rows = read_runs(args.tables, args.name)
    measures = sorted({row.measure for row in rows})
    for measure in args.measure:
        if measure not in measures:
            raise ValueError(f"--measure {measure}: not in these tables; they hold {', '.join(measures) or 'nothing'}")
    chosen = [row for row in rows if not args.measure or row.measure in args.measure]
    systems = list(dict.fromkeys(row.system for row in rows))
    for path in plot_layers(chosen, args.out_dir, systems, args.relative_depth):
        print(path, flush=True)
    if kinds := overview_kinds(chosen):
        for path in plot_overview(kinds, f"{args.out_dir}/overview", systems):
            print(path, flush=True)


if __name__ == "__main__":
    run_main(main)
