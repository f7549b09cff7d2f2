"""What a layer holds besides information and purity: similarity, probes, reconstruction, information of its codes.

One call per system, on features that are in memory; each measure is named in the settings and may be left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from espnet_mamba.analysis.discrete_information import discrete_rows
from espnet_mamba.analysis.probes import phone_rows, speaker_rows
from espnet_mamba.analysis.purity import phones_of_frames
from espnet_mamba.analysis.reconstruction import reconstruction_rows
from espnet_mamba.analysis.settings import AnalysisSettings
from espnet_mamba.analysis.similarity import similarity_rows
from espnet_mamba.analysis.statistics import LayerFeatures
from espnet_mamba.analysis.table import LayerValue
from espnet_mamba.analysis.views import frame_view, open_views
from espnet_mamba.data.kaldi import Segment
from espnet_mamba.data.manifest import Utterance

SMALLEST_SET = 6  # utterances: fewer cannot be split into training, choosing and held-out parts


class LayerMeasures:
    """The measures of one test set, for one system after the other.

    Args:
        settings: which measures, and how.
        folder: the checked set, with utt2spk and, where they are known, phones.ctm and words.ctm.
        utterances: of the set, those that are analysed.
        logmel: their log-mel frames; None leaves out what needs them.
        phones: segments per utterance and the number of each phone label; None leaves out what needs them.
        seed: of every draw.
    """

    def __init__(
        self,
        settings: AnalysisSettings,
        folder: Path,
        utterances: Sequence[Utterance],
        logmel: LayerFeatures | None,
        phones: tuple[Mapping[str, Sequence[Segment]], Mapping[str, int]] | None,
        seed: int,
    ) -> None:
        self.settings, self.folder, self.logmel, self.seed = settings, folder, logmel, seed
        self.speakers = {utterance.utt_id: utterance.speaker for utterance in utterances}
        self.phones = phones
        self.rows: list[LayerValue] = []
        self.notes: list[str] = []

    def add(self, system: str, test: LayerFeatures, fit: LayerFeatures | None) -> None:
        """Measure every layer of a system; ``fit`` are its frames of another set, for k-means."""
        if len(test.utt_ids) < SMALLEST_SET:
            self._note(
                f"similarity, probes and reconstruction are left out: {len(test.utt_ids)} utterances are too few"
            )
            return
        layers = list(range(len(test.names)))
        for measure in self.settings.measures:
            self.rows += getattr(self, f"_{measure}")(system, test, fit, layers)
            print(f"{system}: {measure} of {len(layers)} layers done", flush=True)

    def _similarity(
        self, system: str, test: LayerFeatures, fit: LayerFeatures | None, layers: list[int]
    ) -> list[LayerValue]:
        settings = self.settings.similarity
        sizes = dict(zip(test.utt_ids, test.sizes, strict=True))
        how = (settings.silence, settings.min_instances, settings.central_third)
        views, notes = open_views(settings.views, self.folder, sizes, *how)
        if "logmel" in settings.views and self.logmel is not None:
            views = [frame_view("logmel", self.logmel), *views]
        for note in notes:
            self._note(note)
        return similarity_rows(system, test, views, settings, self.seed)

    def _probes(
        self, system: str, test: LayerFeatures, fit: LayerFeatures | None, layers: list[int]
    ) -> list[LayerValue]:
        rows = speaker_rows(system, test, self.speakers, layers, self.settings.probes, self.seed)
        numbers = self._phones_of(test)
        if numbers is not None:
            rows += phone_rows(system, test, numbers, layers, self.settings.probes, self.seed)
        return rows

    def _reconstruction(
        self, system: str, test: LayerFeatures, fit: LayerFeatures | None, layers: list[int]
    ) -> list[LayerValue]:
        if self.logmel is None:
            return []
        reference = ("logmel", self.logmel.layers[0])
        return reconstruction_rows(system, test, reference, layers, self.settings.reconstruction, self.seed)

    def _discrete_information(
        self, system: str, test: LayerFeatures, fit: LayerFeatures | None, layers: list[int]
    ) -> list[LayerValue]:
        names = sorted(set(self.speakers[utt_id] for utt_id in test.utt_ids))
        speaker = np.array([names.index(self.speakers[utt_id]) for utt_id in test.utt_ids])
        labels = {"speakers": speaker[test.utterance.numpy()]}
        numbers = self._phones_of(test)
        if numbers is not None:
            labels["phones"] = np.where(numbers == 0, -1, numbers)  # 0 is silence
        return discrete_rows(system, test, labels, layers, self.settings.discrete, self.seed, fit)

    def _phones_of(self, test: LayerFeatures) -> np.ndarray | None:
        if self.phones is None:
            return None
        segments, numbers = self.phones
        return phones_of_frames(test, segments, numbers, str(self.folder / "phones.ctm"))

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
