"""One way in and out: find out what a checkpoint is, and write it as our model folder or as Hugging Face's."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from espnet_mamba.data.files import read_json
from espnet_mamba.models.checkpoints import CONFIG, FORMAT, load_checkpoint, save_checkpoint
from espnet_mamba.models.config import HubertConfig
from espnet_mamba.models.convert import fairseq, huggingface, torchaudio_hubert
from espnet_mamba.models.convert.fitting import build_model, infer_config
from espnet_mamba.models.convert.head import head_fits, load_head, save_head
from espnet_mamba.models.convert.hf_export import export_huggingface
from espnet_mamba.models.convert.naming import Renamed
from espnet_mamba.models.convert.reading import read_tensor_file
from espnet_mamba.models.hubert import HubertModel

TARGETS = ("espnet_mamba", "hf")
WRAPPERS = ("model", "model_weight", "state_dict")  # where fairseq, S3PRL and trainers put the tensors


@dataclass(frozen=True)
class Conversion:
    """What was found and what became of it."""

    kind: str  # the source's kind, in words
    config: HubertConfig
    num_tensors: int  # tensors of the source that were used
    dropped: tuple[str, ...]  # tensors of the source left out on purpose
    notes: tuple[str, ...]  # what had to be assumed
    has_head: bool  # the pretraining head was kept


class _Source(NamedTuple):
    kind: str
    renamed: Renamed
    known: dict[str, Any]  # fields of the config that the source tells


def convert(
    source: str | Path, out_dir: str | Path, to: str = "espnet_mamba", config: HubertConfig | None = None
) -> Conversion:
    """Convert a checkpoint of fairseq, S3PRL's repacking of it, transformers, torchaudio, or ours.

    Args:
        source: a file (``torch.save`` or safetensors), or a folder (transformers' or ours).
        out_dir: folder to write, whose name the model gets; replaced if it is empty or a model folder.
        to: ``espnet_mamba`` or ``hf``.
        config: what the source must be, instead of what its settings or its shapes say.

    Raises:
        FileNotFoundError: no source.
        ValueError: an unknown kind of source, code in its pickle, tensors that do not fit (which, expected and found
            shapes), or a folder in the way.
    """
    source, out_dir = Path(source), Path(out_dir)
    if to not in TARGETS:
        raise ValueError(f"to: {to!r} is not one of: {' '.join(TARGETS)}")
    _check_free(source, out_dir)
    ours = source.is_dir() and _folder_kind(source) == FORMAT
    model, head, result = _load_ours(source) if ours else _load_theirs(source, config, out_dir.name)
    if to == "hf":
        export_huggingface(model, out_dir)
        dropped = (*result.dropped, *(f"head.{name}" for name in sorted(head)))
        used = result.num_tensors - len(head)
        return dataclasses.replace(result, num_tensors=used, dropped=dropped, has_head=False)
    save_checkpoint(model, out_dir, _card(source.name, result))
    if head:
        save_head(head, out_dir)
    return result


def _check_free(source: Path, out_dir: Path) -> None:
    """Refuse to replace anything but a model folder, since writing one replaces the whole folder."""
    if out_dir.resolve() in (source.resolve(), *source.resolve().parents):
        raise ValueError(f"{out_dir}: holds the source; choose another folder")
    if not out_dir.exists() or out_dir.is_dir() and not any(out_dir.iterdir()):
        return
    try:
        _folder_kind(out_dir)
    except ValueError as error:
        raise ValueError(f"{out_dir}: exists and is no model folder that could be replaced; choose another") from error


def _folder_kind(folder: Path) -> str:
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder}: no {CONFIG} in it; name a file, or a folder of transformers' or of ours")
    values = read_json(folder / CONFIG)
    kind = (
        values.get("format") or f"model_type {values.get('model_type')!r}" if isinstance(values, dict) else "no object"
    )
    if kind not in (FORMAT, "model_type 'hubert'"):
        raise ValueError(f"{folder / CONFIG}: {kind}: this kind of model cannot be converted, only HuBERT")
    return kind


def _load_ours(folder: Path) -> tuple[HubertModel, dict[str, Tensor], Conversion]:
    model, head = load_checkpoint(folder), load_head(folder)
    tensors = dict(head.state_dict()) if head else {}
    used = len(model.state_dict()) + len(tensors)
    return model, tensors, Conversion("espnet-mamba", model.config, used, (), (), bool(head))


def _load_theirs(
    path: Path, config: HubertConfig | None, name: str
) -> tuple[HubertModel, dict[str, Tensor], Conversion]:
    source = _open(path)
    notes: list[str] = []
    if config is None:
        config, notes = infer_config(source.renamed.tensors, {"name": name} | source.known, str(path))
    model, missing = build_model(config, source.renamed, str(path))
    head, dropped = source.renamed.head, list(source.renamed.dropped)
    if head and not head_fits(head, config.embed_dim):
        dropped += [source.renamed.origin[f"head.{name}"] for name in head]
        head = {}
    used = len(source.renamed.tensors) + len(head)
    result = Conversion(source.kind, config, used, tuple(dropped), tuple(notes + missing), bool(head))
    return model, head, result


def _open(path: Path) -> _Source:
    """Read a source and find out its kind, by its tensors' names."""
    folder = path.is_dir()
    contents = huggingface.read_folder(path) if folder else read_tensor_file(path)
    wrapper = next((name for name in WRAPPERS if isinstance(contents.get(name), dict)), None)
    state = contents[wrapper] if wrapper else contents
    where = str(path)
    if huggingface.recognises(state):
        known = huggingface.known_fields(path) if folder else {}
        return _Source("Hugging Face HubertModel", huggingface.renamed(state, where), known)
    if fairseq.recognises(state):
        known = fairseq.known_fields(fairseq.model_settings(contents), state, where)
        kind = "fairseq HuBERT" + (", repacked by S3PRL" if wrapper == "model_weight" else "")
        return _Source(kind, fairseq.renamed(state, where), known)
    if torchaudio_hubert.recognises(state):
        return _Source("torchaudio HuBERT", torchaudio_hubert.renamed(state, where), {})
    names = ", ".join(list(map(str, state))[:5]) or "nothing"
    raise ValueError(f"{path}: not a HuBERT of fairseq, transformers or torchaudio; it begins with: {names}")


def _card(source: str, result: Conversion) -> str:
    config = result.config
    lines = [
        f"# {config.name}",
        "",
        f"Converted by espnet-mamba from `{source}` ({result.kind}): {result.num_tensors} tensors, "
        f"{config.num_layers} x {config.mixer}, width {config.embed_dim}.",
    ]
    lines += [f"- assumed: {note}" for note in result.notes]
    lines += [f"- left out: `{name}`" for name in result.dropped]
    if result.has_head:
        lines.append("- its pretraining head is kept in `pretraining_head.safetensors`")
    return "\n".join(lines) + "\n"
