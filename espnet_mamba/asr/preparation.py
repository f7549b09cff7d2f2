"""What a training of one system reads: its data lists, and the ESPnet configuration put together for it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import yaml

from espnet_mamba.asr.systems import System
from espnet_mamba.data.files import read_json, write_text
from espnet_mamba.data.kaldi import write_table
from espnet_mamba.data.manifest import Utterance, read_manifest
from espnet_mamba.models.folders import upstream_name

LOGMEL = "logmel.yaml"  # beside the training configuration: what differs for filterbanks


def read_set(dump_dir: Path, name: str) -> list[Utterance]:
    """Return the utterances of ``dump_dir/name`` that have a transcript; the number of others is printed.

    Raises ValueError when the set has no transcripts or no utterances at all.
    """
    folder = dump_dir / name
    utterances = read_manifest(folder)
    if not (folder / "text").is_file():
        raise ValueError(f"{folder}/text: no such file; speech recognition needs transcripts, write data/{name}/text")
    kept = [utt for utt in utterances if utt.text.strip()]
    if not kept:
        raise ValueError(f"{folder}: no utterance with a transcript; check data/{name}/text")
    if len(kept) < len(utterances):
        print(f"{name}: {len(utterances) - len(kept)} of {len(utterances)} utterances have no transcript: left out")
    return kept


def write_lists(utterances: list[Utterance], folder: Path) -> None:
    """Write ESPnet's ``wav.scp``, ``text`` and ``speech_shape`` (samples) of a set into ``folder``."""
    write_table(folder / "wav.scp", {utt.utt_id: utt.path for utt in utterances})
    write_table(folder / "text", {utt.utt_id: utt.text for utt in utterances})
    write_table(folder / "speech_shape", {utt.utt_id: str(utt.num_samples) for utt in utterances})


def system_config(base: Path, system: System, out_dir: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Return ESPnet's options for ``system``: the file ``base``, what its features need, the data, then ``options``.

    ``out_dir`` holds ``data/{train,valid}`` and ``tokens``. A dictionary among ``options`` is merged, not replaced.
    """
    config = read_yaml(base)
    if system.upstream is None:
        config = merged(config, read_yaml(base.with_name(LOGMEL)))
    else:
        width = read_json(system.upstream / "config.json")["embed_dim"]
        config = merged(config, {"preencoder_conf": {"input_size": width}})
        upstream = {"upstream": upstream_name(system.upstream), "path_or_url": str(system.upstream)}
        config = merged(config, {"frontend_conf": {"frontend_conf": upstream}})
    tokens = out_dir.resolve() / "tokens"
    config |= {"token_type": "bpe", "token_list": str(tokens / "tokens.txt"), "bpemodel": str(tokens / "bpe.model")}
    for phase in ("train", "valid"):
        folder = out_dir.resolve() / "data" / phase
        sources = [[str(folder / "wav.scp"), "speech", "sound"], [str(folder / "text"), "text", "text"]]
        config[f"{phase}_data_path_and_name_and_type"] = sources
        config[f"{phase}_shape_file"] = [str(folder / "speech_shape")]
    config |= {"output_dir": str((out_dir / system.name).resolve()), "resume": True}
    return merged(config, options)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of options; FileNotFoundError and ValueError name it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected lines of 'option: value'")
    return config


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``over`` laid on it, dictionaries key by key; front ends share no keys and are replaced."""
    result = dict(base)
    for key, value in over.items():
        keep = isinstance(value, dict) and isinstance(base.get(key), dict)
        if key == "frontend_conf" and over.get("frontend", base.get("frontend")) != base.get("frontend"):
            keep = False
        result[key] = merged(base[key], value) if keep else value
    return result


def write_yaml(path: Path, config: dict[str, Any]) -> None:
    """Write options as YAML, atomically."""
    write_text(path, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))


def digests(system: System, out_dir: Path) -> dict[str, str]:
    """Return a digest of each input file of a training, by a short name: a change of one calls for a new training."""
    files = {"tokens": out_dir / "tokens" / "tokens.txt"}
    files |= {f"{phase} {name}": out_dir / "data" / phase / name for phase in ("train", "valid") for name in FILES}
    if system.upstream is not None:
        files |= {name: system.upstream / name for name in ("config.json", "model.safetensors")}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in files.items()}


FILES = ("wav.scp", "text", "speech_shape")
