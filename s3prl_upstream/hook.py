"""Completes ``s3prl.hub`` with our upstreams at the moment when it is imported; standard library only.

S3PRL has no plugin mechanism, but everything that takes an upstream's name looks it up by ``getattr(s3prl.hub, name)``.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HUB = "s3prl.hub"
PREFIXES = ("mamba_", "ssamba")  # of our upstreams' names


class HubFinder(importlib.abc.MetaPathFinder):
    """Finds ``s3prl.hub`` once, and adds our names to it as soon as its own code has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the ordinary spec of ``s3prl.hub`` with the registration behind its loader; None for other modules."""
        if fullname != HUB:
            return None
        from s3prl_upstream import compat

        compat.before_s3prl()
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run_module = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run_module(module)
            register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register now if ``s3prl.hub`` is loaded, else when it will be; calling it again changes nothing."""
    if HUB in sys.modules:
        register(sys.modules[HUB])
    elif not any(isinstance(finder, HubFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, HubFinder())


def entries() -> dict[str, Callable[..., Any]]:
    """Return our upstreams' functions by the names under which S3PRL shall know them."""
    from s3prl_upstream.mamba_hubert import hubconf as hubert
    from s3prl_upstream.ssamba import hubconf as ssamba

    found = {**vars(hubert), **vars(ssamba)}
    return {name: value for name, value in found.items() if name.startswith(PREFIXES) and callable(value)}


def register(hub: ModuleType) -> None:
    """Put every entry on ``hub``; ValueError when one of the names is already someone else's."""
    for name, function in entries().items():
        present = getattr(hub, name, function)
        if present is not function:
            raise ValueError(f"s3prl.hub already has another upstream named {name!r}; remove one of the two packages")
        setattr(hub, name, function)
