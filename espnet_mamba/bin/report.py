"""Write RESULTS.md and one self-contained report.html from what the other stages left; what is missing is named."""

from __future__ import annotations

import argparse
from pathlib import Path

from espnet_mamba.bin.cli import run_main


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(prog="python -m espnet_mamba.bin.report", description=__doc__)
    parser.add_argument("--exp_dir", type=Path, default=Path("exp"), help="folder of the experiments (exp)")
    parser.add_argument("--tag", required=True, help="name of the run, such as extbimamba_tiny_mini")
    parser.add_argument("--out_dir", type=Path, help="where to write (EXP_DIR/TAG)")
    parser.add_argument("--stages_dir", type=Path, help="folder of stage records (OUT_DIR/stages)")
    parser.add_argument(
        "--targets",
        type=Path,
        nargs="*",
        help="folders with quality.json, one per iteration; with nothing: a model without targets (SSAMBA)",
    )
    parser.add_argument("--pretrain", type=Path, nargs="*", default=[], help="folders with train_log.jsonl")
    parser.add_argument("--asr_dir", type=Path, help="folder with a score.json per system, at any depth")
    parser.add_argument("--superb_dir", type=Path, help="folder with a result.json per system and task, at any depth")
    parser.add_argument("--analysis_dir", type=Path, help="folder of stage 11 (EXP_DIR/analysis_TAG)")
    parser.add_argument("--efficiency_dir", type=Path, help="folder of stage 12")
    parser.add_argument("--config", type=Path, nargs="*", default=[], help="YAMLs of model and training to show")
    return parser


def main() -> None:
    """Parse and call."""
    args = get_parser().parse_args()
    from espnet_mamba.analysis.report import write_report
    from espnet_mamba.analysis.report_inputs import ReportPaths

    out_dir = args.out_dir or args.exp_dir / args.tag
    paths = ReportPaths(
        stages_dir=args.stages_dir or out_dir / "stages",
        targets=args.targets,
        pretrain=args.pretrain,
        asr_dir=args.asr_dir,
        superb_dir=args.superb_dir,
        analysis_dir=args.analysis_dir or args.exp_dir / f"analysis_{args.tag}",
        efficiency_dir=args.efficiency_dir,
        configs=args.config,
    )
    for sentence in write_report(args.tag, paths, out_dir):
        print(sentence, flush=True)
    print(f"report: {out_dir / 'RESULTS.md'} and {out_dir / 'report.html'}", flush=True)


if __name__ == "__main__":
    run_main(main)
