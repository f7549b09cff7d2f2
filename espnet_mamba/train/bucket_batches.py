"""``batch_type: bucket``: utterances of like length, drawn anew in each pass, by seconds of audio per process.

Batch ``number`` of a run is a pure function of (lengths, batch_bins, seed, number): resuming is arithmetic.
"""

from __future__ import annotations

import numpy as np
from espnet2.samplers.build_batch_sampler import BATCH_TYPES

# On import, so that ESPnet's own --batch_type takes the name.
BATCH_TYPES["bucket"] = (
    "Utterances of like length, up to batch_bins samples in each batch of each process (GPU), put together anew in "
    "every pass over the corpus. In training no batch is padded: each is cropped to its shortest, 1 %% on average."
)
JITTER = 0.01  # lengths are taken as this much longer or shorter, by chance: who meets whom; costs as much in crops


class BucketBatches:
    """The endless row of batches of a corpus, pass after pass, each pass with the same number of them.

    A pass sorts the utterances by their lengths times ``1 +- JITTER`` and cuts that row at places that are the same in
    all passes; then the batches are put in a random order. Crops to ``max_samples`` come first: what they cut off
    does not count.
    """

    def __init__(
        self,
        ids: np.ndarray,
        lengths: np.ndarray,
        batch_bins: int,
        seed: int,
        max_samples: int | None = None,
        jitter: float = JITTER,
    ) -> None:
        """Cut ``lengths`` (N,), samples of ``ids`` (N,), into batches of at most ``batch_bins`` samples each.

        An utterance that is longer has a batch to itself.
        """
        self.ids, self.seed, self.jitter = ids, seed, jitter
        self.lengths = lengths if max_samples is None else np.minimum(lengths, max_samples)
        self.cuts = _cuts(np.sort(self.lengths), batch_bins, jitter, max_samples)
        self._pass: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        """Return the number of batches of a pass."""
        return len(self.cuts) - 1

    def batch(self, number: int) -> list[str]:
        """Return the utterances of batch ``number`` of the run, counted from 0."""
        return [utt_id.decode() for utt_id in self.ids[self.indices(number)]]

    def indices(self, number: int) -> np.ndarray:
        """Return the same as places in ``ids``."""
        number, place = divmod(number, len(self))
        if self._pass is None or self._pass[0] != number:
            self._pass = (number, *self._draw(number))
        _, row, order = self._pass
        first, last = self.cuts[order[place] : order[place] + 2]
        return row[first:last]

    @property
    def batches(self) -> list[list[str]]:
        """The batch of the most audio after cropping, and that of the most audio times length, of the first pass."""
        row, order = self._draw(0)
        first, count = self.cuts[:-1], np.diff(self.cuts)
        shortest = np.minimum.reduceat(self.lengths[row], first)
        largest = [int(np.argmax(count * shortest)), int(np.argmax(count * shortest**2))]
        return [self.batch(int(np.flatnonzero(order == place)[0])) for place in dict.fromkeys(largest)]

    def _draw(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a pass's row of utterances (N,) and the order of its batches."""
        generator = np.random.default_rng([self.seed, number])
        noise = generator.uniform(1 - self.jitter, 1 + self.jitter, len(self.lengths))
        row = np.argsort(self.lengths * noise, kind="stable")
        if not self.jitter:
            return row, np.arange(len(self))
        return row, generator.permutation(len(self))


def _cuts(ascending: np.ndarray, batch_bins: int, jitter: float, max_samples: int | None) -> np.ndarray:
    """Return where the sorted row is cut: each batch as many as fit when all are as long as its longest can be.

    Jitter can move someone longer to a place, by ``(1 + jitter) / (1 - jitter)`` at most.
    """
    longest = np.ceil(ascending * ((1 + jitter) / (1 - jitter)))
    if max_samples is not None:
        longest = np.minimum(longest, max_samples)
    fitting = np.maximum(batch_bins // longest, 1).astype(np.int64).tolist()
    cuts = [len(ascending)]
    while cuts[-1] > 0:
        cuts.append(max(0, cuts[-1] - fitting[cuts[-1] - 1]))
    return np.array(cuts[::-1])
