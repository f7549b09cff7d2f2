"""What a layer holds besides information and purity: similarity, probes, reconstruction, information of its codes.

One call per system, on features that are in memory; each measure is named in the settings and may be left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from espnet_mamba.analysis.discrete_information import discrete_rows
from espnet_mamba.analysis.probes import phone_rows, speaker_rows
from espnet_mamba.analysis.purity import number_phones, phones_of_frames
from espnet_mamba.analysis.reconstruction import reconstruction_rows
from espnet_mamba.analysis.settings import AnalysisSettings
from espnet_mamba.analysis.similarity import similarity_rows
from espnet_mamba.analysis.statistics import LayerFeatures
from espnet_mamba.analysis.table import LayerValue
from espnet_mamba.analysis.views import frame_view, open_views
from espnet_mamba.data.kaldi import Segment, read_ctm
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
            Words are read from ``folder``'s words.ctm, where it is there.
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
        path = folder / "words.ctm"
        self.words = read_ctm(path) if path.is_file() else None
        self.notes: list[str] = []

    def measure(self, system: str, test: LayerFeatures, fit: LayerFeatures | None) -> list[LayerValue]:
        """Measure every layer of a system; ``fit`` are its frames of another set, for k-means."""
        if len(test.utt_ids) < SMALLEST_SET:
            self._note(
                f"similarity, probes and reconstruction are left out: {len(test.utt_ids)} utterances are too few"
            )
            return []
        layers, rows = list(range(len(test.names))), []
        progress = tqdm(self.settings.measures, desc=f"{system} measures", unit="measure", mininterval=5)
        for measure in progress:
            progress.set_postfix_str(measure, refresh=False)
            rows += getattr(self, f"_{measure}")(system, test, fit, layers)
        return rows

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
        words = self._words_of(test)
        if words is not None:
            labels["words"] = words
        return discrete_rows(system, test, labels, layers, self.settings.discrete, self.seed, fit)

    def _words_of(self, test: LayerFeatures) -> np.ndarray | None:
        """Return the number of every frame's word, negative for silence and for words of too few utterances."""
        where, fewest = self.folder / "words.ctm", self.settings.discrete.min_utterances
        if self.words is None:
            self._note(f"information of codes on words is left out: it needs {where}")
            return None
        own = {utt_id: self.words[utt_id] for utt_id in test.utt_ids if utt_id in self.words}
        numbers = number_phones(own, self.settings.purity.silence)
        found = phones_of_frames(test, own, numbers, str(where))
        pairs = np.unique(np.stack([found, test.utterance.numpy()]), axis=1)
        spread = np.bincount(pairs[0], minlength=len(numbers) + 1)
        spread[0] = 0  # silence
        most = np.argsort(-spread, kind="stable")[: self.settings.discrete.max_words]
        frequent = np.isin(np.arange(len(spread)), most) & (spread >= max(1, fewest))
        if frequent.sum() < 2:
            self._note(
                f"information of codes on words is left out: {int(frequent.sum())} words of {where} are in {fewest} "
                "utterances or more (discrete: min_utterances)"
            )
            return None
        renumbered = np.where(frequent, np.cumsum(frequent) - 1, -1)
        return renumbered[found]

    def _phones_of(self, test: LayerFeatures) -> np.ndarray | None:
        if self.phones is None:
            return None
        segments, numbers = self.phones
        return phones_of_frames(test, segments, numbers, str(self.folder / "phones.ctm"))

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)
