"""S3PRL's SUPERB problems on our own lists: csv files in, a frozen upstream that computes once, predictions out.

Everything between (datasets, heads, training loop, choice of the best checkpoint, test) is S3PRL's.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING

import s3prl_upstream  # noqa: F401 - registers our upstreams
from espnet_mamba.data.files import write_json
from s3prl_upstream import compat

compat.before_problems()

from s3prl import problem  # noqa: E402 - needs the shims above
from s3prl.task.utterance_classification_task import (  # noqa: E402
    UtteranceClassificationTask,
    UtteranceMultiClassClassificationTask,
)

from s3prl_upstream.frozen import FrozenUpstream  # noqa: E402
from s3prl_upstream.rng import rng_preserved  # noqa: E402

compat.read_shards()

PREDICTIONS = "predictions.json"  # {utterance: {"prediction": ..., "label": ...}}, written by the test
SPLITS = ("train", "valid", "test")
AUDIO_BYTES = 2**30  # a data set's audio is held in memory up to this size
GAIN_DB = -3.0  # SUPERB's for keywords


class _WritesPredictions:
    """In front of a task: the test also writes what was predicted for each utterance."""

    def reduction(self, _mode: str, cached_results: list[dict], _dump_dir: str | None = None) -> dict[str, Any]:
        """Return the task's metrics; in the mode ``test`` leave the predictions in ``_dump_dir``."""
        if _mode == "test" and _dump_dir is not None:
            rows = {}
            for batch in cached_results:
                for name, found, label in zip(batch["unique_name"], batch["prediction"], batch["label"], strict=True):
                    rows[str(name)] = {"prediction": found, "label": label}
            write_json(Path(_dump_dir) / PREDICTIONS, rows)
        return super().reduction(_mode, cached_results, _dump_dir)  # type: ignore[misc]


class _IntentTask(_WritesPredictions, UtteranceMultiClassClassificationTask):
    def reduction(self, _mode: str, cached_results: list[dict], _dump_dir: str | None = None) -> dict[str, Any]:
        """Add ``slot_accuracy``: with little speech hardly any utterance has all slots right, which ranks nothing."""
        slots = [
            found == label
            for batch in cached_results
            for row in zip(batch["prediction"], batch["label"], strict=True)
            for found, label in zip(*row, strict=True)
        ]
        return super().reduction(_mode, cached_results, _dump_dir) | {"slot_accuracy": sum(slots) / len(slots)}


class _LabelTask(_WritesPredictions, UtteranceClassificationTask):
    pass


class _OnLists:
    """In front of a problem: data from ``prepare_data.csv_dir``, and no work done twice."""

    task_class: type

    def default_config(self) -> dict[str, Any]:
        """Return the problem's defaults with ``csv_dir`` in place of a corpus' root, on the device at hand."""
        config = super().default_config()  # type: ignore[misc]
        config["prepare_data"] = {"csv_dir": MISSING}
        config["build_upstream"] |= {"path_or_url": None, "cache_mb": 1024.0}
        return config | {"device": "cuda" if torch.cuda.is_available() else "cpu", "num_workers": 0}

    def prepare_data(
        self, prepare_data: dict[str, Any], target_dir: str, cache_dir: str, get_path_only: bool = False
    ) -> tuple[Path, Path, list[Path]]:
        """Copy ``train.csv``, ``valid.csv`` and ``test.csv`` to the experiment and return their paths."""
        paths = [Path(target_dir) / f"{split}.csv" for split in SPLITS]
        if not get_path_only:
            for path in paths:
                shutil.copy(Path(prepare_data["csv_dir"]) / path.name, path)
        return paths[0], paths[1], [paths[2]]

    def build_upstream(self, build_upstream: dict[str, Any]) -> FrozenUpstream:
        """Return the named S3PRL upstream, frozen and remembering up to ``cache_mb`` MB of layers."""
        conf = dict(build_upstream)
        cache_mb = conf.pop("cache_mb")
        with rng_preserved():
            return FrozenUpstream(super().build_upstream(conf), cache_mb)  # type: ignore[misc]

    def build_dataset(self, build_dataset: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return the problem's data set, its audio read once unless utterances are cropped at random."""
        dataset = super().build_dataset(build_dataset, *args, **kwargs)  # type: ignore[misc]
        cropped = any((conf or {}).get("max_secs") for conf in build_dataset.values())
        if cropped or len(dataset) == 0 or dataset[0]["x"].nbytes * len(dataset) > AUDIO_BYTES:
            return dataset
        return [dataset[i] for i in range(len(dataset))]

    def build_task(self, build_task: dict[str, Any], model: Any, encoder: Any, **_: Any) -> Any:
        """Return the problem's task with predictions written by its test."""
        return self.task_class(model, encoder)


class SuperbIC(_OnLists, problem.SuperbIC):
    """Intent classification. csv: id, wav_path, labels ("a ; b ; c")."""

    task_class = _IntentTask


class SuperbSID(_OnLists, problem.SuperbSID):
    """Speaker identification. csv: id, wav_path, label."""

    task_class = _LabelTask


class _Quieter:
    """A data set at GAIN_DB: what sox's ``gain`` does, which clips first, without sox."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index]
        return item | {"x": item["x"].clamp(-1.0, 1.0) * 10 ** (GAIN_DB / 20)}


class _WithoutSox:
    """In front of ``SuperbKS``: no libsox, and every example of the valid split once, as in the test."""

    def default_config(self) -> dict[str, Any]:
        """Return the problem's defaults without sox effects."""
        return super().default_config() | {"build_dataset": {}}  # type: ignore[misc]

    def build_dataset(self, *args: Any, **kwargs: Any) -> _Quieter:
        """Return the problem's data set, which cuts ``start_sec`` to ``end_sec`` out, with the gain done here."""
        return _Quieter(super().build_dataset(*args, **kwargs))  # type: ignore[misc]

    def build_batch_sampler(
        self, build_batch_sampler: dict[str, Any], target_dir: str, cache_dir: str, mode: str, *rest: Any, **named: Any
    ) -> Any:
        """Return S3PRL's class-balanced sampler for training only: it draws a random part of a small valid split."""
        if mode == "valid":
            build_batch_sampler, mode = build_batch_sampler | {"test": build_batch_sampler.get("valid")}, "test"
        return super().build_batch_sampler(  # type: ignore[misc]
            build_batch_sampler, target_dir, cache_dir, mode, *rest, **named
        )


class SuperbKS(_OnLists, _WithoutSox, problem.SuperbKS):
    """Keyword spotting. csv: id, wav_path, label, start_sec, end_sec."""

    task_class = _LabelTask


PROBLEMS = {"ks": SuperbKS, "ic": SuperbIC, "sid": SuperbSID}
