"""Built models, kept while they are small enough beside what is measured."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from espnet_mamba.efficiency.entries import Entry
from espnet_mamba.efficiency.memory_limit import available_memory_mb
from espnet_mamba.efficiency.samples import Samples

_SHARE = 0.25  # of the memory that is available at the start: the rest is for the calls


class ModelPool:
    """Builds models when they are wanted; gives the longest unused back when all together are too large."""

    def __init__(self, entries: Sequence[Entry], device: str, samples: Samples) -> None:
        self.entries = {entry.name: entry for entry in entries}
        self.device, self.samples = device, samples
        self.limit_mb = _SHARE * available_memory_mb(device)
        self.models: OrderedDict[str, nn.Module] = OrderedDict()

    def get(self, name: str) -> nn.Module:
        """Return the model of an entry on the device, without gradients."""
        if name not in self.models:
            model = self.entries[name].build().to(self.device)
            if name not in self.samples.parameters:
                self.samples.add("parameters", sum(p.numel() for p in model.parameters()), model=name)
            self.models[name] = model
            while len(self.models) > 1 and sum(map(_size_mb, self.models.values())) > self.limit_mb:
                self.models.popitem(last=False)
        self.models.move_to_end(name)
        return self.models[name]

    def drop(self, name: str) -> None:
        """Forget a model whose call failed: it may hold gradients of a part of it."""
        self.models.pop(name, None)


def _size_mb(model: nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
