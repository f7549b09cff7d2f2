"""The package's side of the helper process: start it, ask it, read what it says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Speech:
    """What espeak said of ``text``: ``samples`` int16 at ``rate`` a second, and its phones.

    A phone is the sample at which it begins, espeak's mnemonic, and the place in ``text`` where its word begins.
    """

    text: str
    rate: int
    samples: np.ndarray
    phones: list[tuple[int, str, int]]


class Speaker:
    """One running helper process; use as a context manager."""

    def __init__(self) -> None:
        # find_spec, not import: the package itself never loads the library.
        if importlib.util.find_spec("espeakng_loader") is None:
            raise ValueError("espeakng-loader is not installed; pip install espnet-mamba[mini]")
        # The helper must find this package wherever it was found here: a checkout need not be installed.
        search_path = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH")) if path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "espnet_mamba.data.synth.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": search_path},
        )

    def say(self, text: str, voice: str, pitch: int, rate: int) -> Speech:
        """Speak ``text``; ValueError carries the helper's own words when it cannot."""
        to_helper, from_helper = self._process.stdin, self._process.stdout
        assert to_helper is not None and from_helper is not None  # both are pipes
        request = {"text": text, "voice": voice, "pitch": pitch, "rate": rate}
        try:
            to_helper.write(json.dumps(request).encode() + b"\n")
            to_helper.flush()
        except BrokenPipeError:
            pass  # it has ended: the empty answer below says so
        line = from_helper.readline()
        if not line:
            raise ValueError(f"the espeak helper ended with status {self._process.wait()}; its message stands above")
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        samples = np.frombuffer(from_helper.read(answer["num_bytes"]), dtype="<i2")
        return Speech(text, answer["rate"], samples, [(start, name, place) for start, name, place in answer["phones"]])

    def __enter__(self) -> Speaker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
