"""Tensors out of files that strangers wrote: safetensors, or a pickle of which no code is ever run."""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

# fairseq stores its settings and dictionaries as objects beside the weights (fairseq#3624). What bears one of these
# names becomes an empty object: its class is neither imported nor called, so the list is about tidiness, not trust.
INERT = re.compile(
    r"(fairseq|omegaconf|numpy|typing|enum)\..+|argparse\.Namespace|collections\.defaultdict"
    r"|builtins\.(object|int|float|str|bytes|bool|list|dict|tuple)"
)
LEGACY_PICKLES = 4  # magic number, protocol, machine, contents
MAX_DEPTH = 16  # settings refer to each other, if a stranger wants, in circles


class StandIn:
    """What an object of fairseq's settings becomes: it keeps its attributes and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        """Take any arguments: they are those of the class in whose place this one stands."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key: Any, value: Any) -> None: ...


def read_tensor_file(path: str | Path) -> dict[str, Any]:
    """Read a ``.safetensors`` or a file of ``torch.save``, the latter with ``weights_only=True``.

    Objects of fairseq, omegaconf and numpy come back as ``StandIn`` (see ``plain``).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, holds no dictionary, or its pickle asks for code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not readable ({error}); fetch it again") from error
    contents = _read_pickle(path)
    if not isinstance(contents, dict):
        raise ValueError(f"{path}: holds a {type(contents).__name__}, not a dictionary of tensors")
    return contents


def _read_pickle(path: Path) -> Any:
    try:
        zipped = zipfile.is_zipfile(path)
        wanted = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else _settings_in_legacy(path)
        refused = [name for name in wanted if not INERT.fullmatch(name)]
        if not refused:
            with torch.serialization.safe_globals([_stand_in(name) for name in wanted]):
                # mapped: half of a training checkpoint is optimiser state that nobody reads
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise ValueError(f"{path}: not a file of torch.save ({_one_line(error)})") from error
        refused = [named.group(1)]
    except Exception as error:  # bytes of a stranger: anything may be raised
        raise ValueError(f"{path}: not a file of torch.save ({_one_line(error)})") from error
    raise ValueError(
        f"{path}: refused: its pickle asks for {', '.join(refused[:4])}, which would run code; nothing of it was run. "
        "Only tensors and plain values are read"
    )


def _settings_in_legacy(path: Path) -> list[str]:
    """List the settings' classes that a file of before torch 1.6 asks for; what else it asks for, torch refuses."""
    names = set()
    with open(path, "rb") as handle:
        for _ in range(LEGACY_PICKLES):
            for opcode, argument, _ in pickletools.genops(handle):  # reads, runs nothing
                if opcode.name == "GLOBAL":
                    name = argument.replace(" ", ".").replace("__builtin__.", "builtins.")
                    names.add("builtins.int" if name == "builtins.long" else name)
    return [name for name in names if INERT.fullmatch(name)]


def _stand_in(name: str) -> type[StandIn]:
    module, _, qualname = name.rpartition(".")
    return type(qualname, (StandIn,), {"__module__": module})


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def plain(value: Any, depth: int = 0) -> Any:
    """Turn settings (argparse's, omegaconf's, dictionaries, nested) into plain values; what is neither becomes None."""
    if depth > MAX_DEPTH:
        return None
    if isinstance(value, StandIn):
        inside = vars(value)
        for part in ("_content", "_val"):  # omegaconf: a container, a leaf
            if part in inside:
                return plain(inside[part], depth + 1)
        return plain(inside, depth + 1) if inside else None
    if isinstance(value, dict):
        return {key: plain(item, depth + 1) for key, item in value.items() if isinstance(key, str)}
    if isinstance(value, list | tuple):
        return [plain(item, depth + 1) for item in value]
    return value if isinstance(value, str | int | float | bool) else None
