"""The settings of the analysis stage: one YAML, read into frozen dataclasses; an unknown key is refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from espnet_mamba.analysis.bounds import BoundSettings
from espnet_mamba.analysis.discrete_information import DiscreteSettings
from espnet_mamba.analysis.ksg import KsgSettings
from espnet_mamba.analysis.mine import MinePaperSettings
from espnet_mamba.analysis.probes import ProbeSettings
from espnet_mamba.analysis.reconstruction import ReconstructionSettings
from espnet_mamba.analysis.similarity import SimilaritySettings
from espnet_mamba.names import nearest


@dataclass(frozen=True)
class PuritySettings:
    """k-means and silence; ``clusters`` K, ``silence`` the labels that are left out of fit and score."""

    clusters: tuple[int, ...] = (50, 100)
    iterations: int = 30
    silence: tuple[str, ...] = ("sil", "SIL", "sp", "spn")
    resamples: int = 1000

    def __post_init__(self) -> None:
        object.__setattr__(self, "clusters", tuple(int(k) for k in self.clusters))
        object.__setattr__(self, "silence", tuple(str(label) for label in self.silence))


# Input points: what a layer's mutual information is measured with. Papers say "local feature" and mean different ones:
#   layer0  what enters block 1, which is what paper 1's code takes: projected, with positions, normalised;
#   conv    the front end's convolution output, before its norm and projection, which the work that paper 1 cites takes;
#   logmel  log-mel energies of the waveform, the same for every model: the only one by which models can be compared.
REFERENCES = ("layer0", "conv", "logmel")
INFORMATION = ("mine_paper", "mine_paper_reuse", "bounds", "ksg")  # estimators of mutual information
MEASURES = ("similarity", "probes", "reconstruction", "discrete_information")  # beside information and purity


@dataclass(frozen=True)
class AnalysisSettings:
    """All settings of ``bin.analyse``; conf/analysis/*.yaml says unit and default of each."""

    max_utterances: int | None = None
    max_memory_mb: float = 2000.0
    dtype: str = "float32"
    keep_features: str | None = None
    references: tuple[str, ...] = REFERENCES
    information: tuple[str, ...] = INFORMATION
    mine_utterances: int = 12
    mine_seeds: int = 5
    mine_paper: MinePaperSettings = field(default_factory=MinePaperSettings)
    bounds: BoundSettings = field(default_factory=BoundSettings)
    per_utterance_utterances: int = 4
    ksg: KsgSettings = field(default_factory=KsgSettings)
    purity: PuritySettings = field(default_factory=PuritySettings)
    measures: tuple[str, ...] = MEASURES
    similarity: SimilaritySettings = field(default_factory=SimilaritySettings)
    probes: ProbeSettings = field(default_factory=ProbeSettings)
    reconstruction: ReconstructionSettings = field(default_factory=ReconstructionSettings)
    discrete: DiscreteSettings = field(default_factory=DiscreteSettings)

    def __post_init__(self) -> None:
        for key, known in (("references", REFERENCES), ("information", INFORMATION), ("measures", MEASURES)):
            object.__setattr__(self, key, tuple(getattr(self, key)))
            for name in getattr(self, key):
                if name not in known:
                    raise ValueError(f"{key}: {name!r} is not one of: {' '.join(known)}")
        if self.dtype not in ("float32", "float16"):
            raise ValueError(f"dtype: {self.dtype!r} is not one of: float32 float16")
        if self.mine_paper.reuse_critic:
            raise ValueError("mine_paper: reuse_critic is not set here; name mine_paper_reuse under information")


_GROUPS = {
    "mine_paper": MinePaperSettings,
    "bounds": BoundSettings,
    "ksg": KsgSettings,
    "purity": PuritySettings,
    "similarity": SimilaritySettings,
    "probes": ProbeSettings,
    "reconstruction": ReconstructionSettings,
    "discrete": DiscreteSettings,
}


def load_settings(path: str | Path) -> AnalysisSettings:
    """Read a YAML of analysis settings; ValueError names the file, the unknown key and the nearest known one."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file of analysis settings; conf/analysis/mini.yaml is one")
    values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    for name, group in _GROUPS.items():
        if name in values:
            values[name] = _build(group, values[name] or {}, f"{path}: {name}")
    return _build(AnalysisSettings, values, str(path))


def _build(kind: Any, values: dict[str, Any], where: str) -> Any:
    known = [entry.name for entry in fields(kind)]
    for key in values:
        if key not in known:
            near = nearest(key, known)
            raise ValueError(
                f"{where}: unknown key {key!r}" + (f", did you mean {near!r}?" if near else f"; known: {known}")
            )
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error
