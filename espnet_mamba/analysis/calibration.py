"""Every estimator of mutual information on data whose answer is known (calibration_data.py): what may be believed.

Jobs (one case, one group of estimators, one seed) are run one after another and kept as they come, so a run that was
stopped goes on where it was. Coverage is counted on seeds of its own, which nothing was tuned on.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np

from espnet_mamba.analysis.bounds import Bound, BoundSettings, held_out_bounds
from espnet_mamba.analysis.calibration_data import KnownCase, chain, folded, gaussians, noisy_channel, scaled
from espnet_mamba.analysis.discrete_information import count_pairs, rows_of_counts
from espnet_mamba.analysis.ksg import KsgSettings, KsgValue, ksg_values
from espnet_mamba.analysis.mine import MinePaperSettings
from espnet_mamba.analysis.mutual_information import mine_paper_rows
from espnet_mamba.analysis.sampling import seed_from
from espnet_mamba.analysis.splits import shuffled_null, stack_layers
from espnet_mamba.analysis.statistics import LayerFeatures
from espnet_mamba.data.files import atomic_path

_NAN = float("nan")
SECTIONS = ("gaussians", "scaling", "chain", "folded", "memory", "codes", "coverage")
FACTORS = ((1.0, 1.0), (0.01, 1.0), (1.0, 0.01), (1000.0, 1.0), (1.0, 1000.0), (0.01, 1000.0))
METHODS = ("bounds", "ksg", "mine_paper", "mine_paper_reuse")
_CODES = (20, (0.0, 0.5, 0.9))  # labels, and the chances that a code is its label
_MEMORY = 0.95
_WIDE = 100  # dimensions: wider Gaussians take minutes


@dataclass(frozen=True)
class CalibrationSettings:
    """What is run: the estimators' own defaults, on data of the stated size."""

    frames: int = 12000
    utts: int = 40
    dims: tuple[int, ...] = (1, 20, 768)
    truths: tuple[float, ...] = (0.0, 0.5, 2.0, 5.0)  # nats
    sections: tuple[str, ...] = SECTIONS
    bounds: BoundSettings = field(default_factory=BoundSettings)
    ksg: KsgSettings = field(default_factory=KsgSettings)
    ksg_most: int = 20  # components: beside the default number, as many as the case has, up to this
    mine: MinePaperSettings = field(default_factory=MinePaperSettings)
    mine_utterances: int = 12
    mine_frames: int = 500  # per utterance, of the published protocol, which takes each utterance by itself
    resamples: int = 1000  # of the bootstrap over utterances for codes
    coverage_seeds: int = 20
    first_seed: int = 1000  # of the data and the estimators of the coverage
    coverage_dims: tuple[int, ...] = (1, 20)
    coverage_truths: tuple[float, ...] = (0.5, 2.0)
    coverage_critics: int = 1  # per estimator: critics differ by a tenth of the interval and less

    def __post_init__(self) -> None:
        for name in self.sections:
            if name not in SECTIONS:
                raise ValueError(f"sections: {name!r} is not one of: {' '.join(SECTIONS)}")

    def quick(self) -> CalibrationSettings:
        """Return settings that end in seconds and still tell right from wrong at 1 dimension."""
        small = replace(
            self.bounds, steps=20, check_every=10, batch_frames=64, check_frames=200, held_out_frames=600, seeds=1
        )
        return replace(
            self,
            frames=3000,
            utts=20,
            dims=(1, 8),
            bounds=replace(small, resamples=100),
            ksg=replace(self.ksg, held_out_frames=600),
            mine=replace(self.mine, epochs=5),
            mine_utterances=2,
            mine_frames=300,
            resamples=100,
            coverage_seeds=3,
            coverage_dims=(1,),
        )


@dataclass(frozen=True)
class CalibrationRow:
    """One estimate in nats of one known case, with its truth; the rest as in ``table.LayerValue``."""

    section: str
    case: str
    dim: int
    label: str
    estimator: str
    seed: int
    truth: float
    value: float
    low: float = _NAN
    high: float = _NAN
    null: float = _NAN
    ceiling: float = _NAN
    flag: str = ""
    num_frames: int = 0
    num_utts: int = 0
    num_seeds: int = 1
    doubt: float = _NAN  # nats: a bound's slack, a nearest-neighbour value's bias

    @property
    def covers(self) -> bool:
        """Whether the 95 % interval holds the truth."""
        return self.low <= self.truth <= self.high

    @property
    def right(self) -> bool:
        """Whether the value is within 10 % of the truth; of nothing, at most 0.05 nats."""
        return self.value <= 0.05 if self.truth == 0.0 else abs(self.value / self.truth - 1.0) <= 0.1


@dataclass(frozen=True)
class Job:
    """One case and one group of estimators; ``name`` is its file's."""

    name: str
    run: Callable[[], list[CalibrationRow]]


def jobs_of(settings: CalibrationSettings) -> Iterator[Job]:
    """Yield all jobs of the sections asked for, the quick ones first: the widest Gaussians come last."""
    if "codes" in settings.sections:
        yield Job("codes", lambda: _codes(settings))
    yield from _jobs("chain", 3, 0, lambda size: chain(*size, seed=3), settings)
    yield from _jobs("folded", 1, 0, lambda size: folded(*size, seed=4), settings)
    truths = settings.truths[:3]
    yield from _jobs("memory", 4, 0, lambda size: gaussians(4, truths, *size, seed=5, memory=_MEMORY), settings)
    for number, factors in enumerate(FACTORS):
        yield from _jobs("scaling", 4, number, partial(_scaled_by, factors), settings)
    narrow = [dim for dim in settings.dims if dim <= _WIDE]
    for dim in narrow:
        yield from _jobs("gaussians", dim, 0, partial(_gaussians_of, dim, settings.truths), settings)
    if "coverage" in settings.sections:
        yield from _coverage_jobs(settings)
    for dim in settings.dims:
        if dim not in narrow:
            yield from _jobs("gaussians", dim, 0, partial(_gaussians_of, dim, settings.truths), settings)


def _scaled_by(factors: tuple[float, float], size: tuple[int, int]) -> KnownCase:
    return scaled(gaussians(4, (1.0,), *size, seed=2), *factors)


def _gaussians_of(dim: int, truths: Sequence[float], size: tuple[int, int]) -> KnownCase:
    return gaussians(dim, truths, *size, seed=1)


def _jobs(
    section: str, dim: int, number: int, make: Callable[[tuple[int, int]], KnownCase], settings: CalibrationSettings
) -> Iterator[Job]:
    """Yield one job per group of estimators; ``make`` (frames, utterances) draws the data, when they are needed."""
    size = (settings.frames, settings.utts)
    for method in METHODS if section in settings.sections else ():
        run = partial(_drawn, section, make, size, method, settings)
        yield Job(f"{section}-{dim}-{number}-{method}", run)


def _drawn(
    section: str,
    make: Callable[[tuple[int, int]], KnownCase],
    size: tuple[int, int],
    method: str,
    settings: CalibrationSettings,
) -> list[CalibrationRow]:
    return measure(section, make(size), method, settings)


def _coverage_jobs(settings: CalibrationSettings) -> Iterator[Job]:
    few = replace(settings, ksg_most=0, bounds=replace(settings.bounds, seeds=settings.coverage_critics))
    for seed in range(settings.first_seed, settings.first_seed + settings.coverage_seeds):
        for dim in settings.coverage_dims:
            yield Job(f"coverage-{dim}-{seed}", partial(_coverage, few, dim, seed))


def _coverage(settings: CalibrationSettings, dim: int, seed: int) -> list[CalibrationRow]:
    case = gaussians(dim, settings.coverage_truths, settings.frames, settings.utts, seed)
    return [row for method in METHODS[:2] for row in measure("coverage", case, method, settings, seed, null=False)]


def measure(
    section: str, case: KnownCase, method: str, settings: CalibrationSettings, seed: int = 0, null: bool = True
) -> list[CalibrationRow]:
    """Return one group's estimates of every layer of a case; ``null`` also on shuffled utterances, one critic each."""
    if method.startswith("mine_paper"):
        return _mine(section, case, settings, seed, method.endswith("_reuse"))
    y = stack_layers(case.layers)
    found, nothing = _estimates(case, y, method, settings, seed), {}
    if null:
        apart = replace(case, x=case.x[shuffled_null(case.utterance)])
        once = replace(settings, bounds=replace(settings.bounds, seeds=1, resamples=1))
        nothing = _estimates(apart, y, method, once, seed)
    rows = []
    for estimator, values in found.items():
        for layer, value in enumerate(values):
            rows.append(
                CalibrationRow(
                    section,
                    case.name,
                    case.dim,
                    case.labels[layer],
                    estimator,
                    seed,
                    case.truths[layer],
                    value.value,
                    value.low,
                    value.high,
                    nothing[estimator][layer].value if null else _NAN,
                    float(value.ceiling),
                    value.flag,
                    value.num_frames,
                    value.num_utts,
                    settings.bounds.seeds if method == "bounds" else 1,
                    float(value.slack if isinstance(value, Bound) else value.bias),
                )
            )
    return rows


def _estimates(
    case: KnownCase, y: np.ndarray, method: str, settings: CalibrationSettings, seed: int
) -> dict[str, list[Bound]] | dict[str, list[KsgValue]]:
    if method == "bounds":
        return held_out_bounds(case.x, y, case.utterance, settings.bounds, seed)
    counts = dict.fromkeys((settings.ksg.components, max(settings.ksg.components, min(case.dim, settings.ksg_most))))
    return {
        f"ksg{count}": ksg_values(case.x, y, case.utterance, replace(settings.ksg, components=count), seed)
        for count in counts
    }


def _mine(section: str, case: KnownCase, settings: CalibrationSettings, seed: int, reuse: bool) -> list[CalibrationRow]:
    """Return the published protocol's rows: its mean over utterances of ``mine_frames`` frames each."""
    cut = case.recut(settings.mine_frames)
    utts = [f"utt{number:04d}" for number in range(int(cut.utterance.max()) + 1)]
    features = LayerFeatures(cut.labels, cut.layers, utts, cut.utterance)
    protocol = replace(settings.mine, reuse_critic=reuse)
    rows = mine_paper_rows(
        case.name, features, ("x", cut.x), range(len(cut.layers)), protocol, settings.mine_utterances, seed
    )
    kept = ("estimator", "value", "low", "high", "null", "ceiling", "flag", "num_frames", "num_utts", "num_seeds")
    return [
        CalibrationRow(
            section=section,
            case=case.name,
            dim=case.dim,
            label=case.labels[row.layer],
            seed=seed,
            truth=case.truths[row.layer],
            **{name: getattr(row, name) for name in kept},
        )
        for row in rows
    ]


def _codes(settings: CalibrationSettings) -> list[CalibrationRow]:
    """Return plug-in and corrected information of labels through noisy channels, which no k-means comes between."""
    count, chances = _CODES
    utterance = np.arange(settings.frames) // (settings.frames // settings.utts)
    rows = []
    for kept in chances:
        labels, codes, truth = noisy_channel(count, kept, settings.frames, seed=6)
        counts = count_pairs(labels, codes, utterance, (settings.utts, count, count))
        key = ("codes", 0, "", count, "labels")
        for row in rows_of_counts(key, counts, np.full(2, _NAN), settings.resamples, 0):
            if row.unit == "nats":
                case, name = f"codes, {count} labels", row.estimator.removeprefix(f"kmeans{count}_")
                rows.append(
                    CalibrationRow(
                        "codes",
                        case,
                        1,
                        f"{kept:g} kept",
                        name,
                        0,
                        truth,
                        row.value,
                        row.low,
                        row.high,
                        ceiling=row.ceiling,
                        num_frames=row.num_frames,
                        num_utts=row.num_utts,
                    )
                )
    return rows


def calibrate(settings: CalibrationSettings, out_dir: str | Path) -> list[CalibrationRow]:
    """Run all jobs that have no rows in ``out_dir`` yet; return all rows, also written to ``calibration.csv``.

    Rows of other settings are not taken: a folder per settings, named by their digest, holds one file per job.
    """
    parts = Path(out_dir) / "parts" / _digest(settings)
    rows = []
    for job in jobs_of(settings):
        path = parts / f"{job.name}.csv"
        if not path.is_file():
            found = job.run()
            write_rows(path, found)
            for row in found:
                print(line_of(row), flush=True)
        rows += read_rows(path)
    write_rows(Path(out_dir) / "calibration.csv", rows)
    return rows


def _digest(settings: CalibrationSettings) -> str:
    """Name what changes a value; what only adds jobs or changes speed does not count."""
    bounds, mine = replace(settings.bounds, critics_at_once=1), replace(settings.mine, problems_at_once=1)
    asked = replace(settings, sections=SECTIONS, dims=(), coverage_dims=(), coverage_seeds=0, bounds=bounds, mine=mine)
    return f"{seed_from(asked):016x}"


def line_of(row: CalibrationRow) -> str:
    """Return one row as a line to read while it runs."""
    where = f"{row.section} {row.case} d={row.dim} {row.label}".ljust(58)
    flag = f"  {row.flag}" if row.flag else ""
    return f"{where} {row.estimator:18} {row.value:7.3f} [{row.low:.3f}, {row.high:.3f}] of {row.truth:.3f}{flag}"


_COLUMNS = tuple(column.name for column in fields(CalibrationRow))
_INTEGERS = ("dim", "seed", "num_frames", "num_utts", "num_seeds")
_TEXTS = ("section", "case", "label", "estimator", "flag")


def write_rows(path: str | Path, rows: Sequence[CalibrationRow]) -> None:
    """Write rows as CSV; nan becomes an empty cell."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, _COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow({k: "" if v == "nan" else v for k, v in cells.items()})


def read_rows(path: str | Path) -> list[CalibrationRow]:
    """Read what :func:`write_rows` wrote; ValueError names the file when it is something else."""
    with open(path, newline="", encoding="utf-8") as handle:
        try:
            return [
                CalibrationRow(**{name: _cell(name, cells[name]) for name in _COLUMNS})
                for cells in csv.DictReader(handle)
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not a calibration table ({error}); delete it and run again") from error


def _cell(name: str, text: str) -> str | int | float:
    if name in _TEXTS:
        return text
    return int(text) if name in _INTEGERS else float(text or math.nan)
