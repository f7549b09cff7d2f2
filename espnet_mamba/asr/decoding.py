"""Decodes a test set with every trained recogniser, in parallel, and scores the hypotheses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from espnet_mamba.asr import scoring
from espnet_mamba.asr.jobs import Job, run_jobs
from espnet_mamba.asr.preparation import read_set, read_yaml
from espnet_mamba.asr.systems import NAMES
from espnet_mamba.data.files import read_json, write_json
from espnet_mamba.data.kaldi import read_table, write_table
from espnet_mamba.data.manifest import Utterance


def decode_systems(
    config: Path, dump_dir: Path, test_set: str, asr_dir: Path, names: list[str], options: dict[str, Any], nj: int
) -> str:
    """Decode ``dump_dir/test_set`` with the systems ``names`` of ``asr_dir`` (all of them when empty) and score them.

    Each system's folder receives ``decode_<test_set>/{text,ref,failed.json}``, ``score.json`` and ``errors.tsv``,
    ``asr_dir`` the ``comparison.json``. Returns a table of the scores. Raises ValueError for a system that is not
    trained, for tokens that are not those it was trained with, and for a set without transcripts.
    """
    settings = read_yaml(config) | options
    model_file = settings.pop("asr_model_file", "valid.acc.ave.pth")
    utterances = read_set(dump_dir, test_set)
    folders = [_trained(asr_dir, name, model_file) for name in names or _found(asr_dir)]
    _import_once()
    shards = max(1, -(-nj // len(folders)))
    jobs = []
    for folder in folders:
        work = folder / f"decode_{test_set}"
        for shard in range(shards):
            args = (folder, model_file, settings, utterances[shard::shards], work / f"part{shard}.json")
            log = work / f"decode{shard}.log"
            log.unlink(missing_ok=True)
            jobs.append(Job(f"decode {folder.name} {shard + 1}/{shards}", decode_part, log, args))
    run_jobs(jobs, nj, progress)
    return _score(asr_dir, folders, test_set, utterances, shards)


def _found(asr_dir: Path) -> list[str]:
    names = [name for name in NAMES if (asr_dir / name / "config.yaml").is_file()]
    if not names:
        raise ValueError(f"{asr_dir}: no trained system in this folder; the stage 'asr_train' makes them")
    return names


def _trained(asr_dir: Path, name: str, model_file: str) -> Path:
    """Return a system's folder after checking that its model and its tokens are there and belong together."""
    folder = asr_dir / name
    if not (folder / "config.yaml").is_file() or not (folder / model_file).exists():
        there = sorted(path.name for path in folder.glob("*.pth")) if folder.is_dir() else []
        hint = f"the models there are {', '.join(there)}" if there else "the stage 'asr_train' makes it"
        raise ValueError(f"{folder / model_file}: no such model; {hint}")
    trained_with = read_yaml(folder / "config.yaml")
    tokens = asr_dir / "tokens" / "tokens.txt"
    if not tokens.is_file() or tokens.read_text(encoding="utf-8").splitlines() != trained_with["token_list"]:
        raise ValueError(f"{tokens}: not the tokens that {folder} was trained with; train the system again")
    upstream = (trained_with["frontend_conf"].get("frontend_conf") or {}).get("path_or_url")
    if upstream and not Path(upstream).is_dir():
        raise ValueError(f"{upstream}: the upstream folder of {folder} is gone; the stage 'upstream' makes it")
    return folder


def _import_once() -> None:
    """Import ESPnet and S3PRL before the processes are forked, so that they share it."""
    from espnet2.bin import asr_inference

    from espnet_mamba.asr.task import ASRTask
    from s3prl_upstream import preload

    preload()
    asr_inference.ASRTask = ASRTask


def decode_part(
    folder: Path, model_file: str, settings: dict[str, Any], utterances: list[Utterance], out: Path
) -> None:
    """Decode ``utterances`` and write ``{"text": {id: hypothesis}, "failed": {id: reason}}`` to ``out``.

    An utterance whose decoding fails keeps an empty hypothesis, so that it is scored, and its reason is written.
    """
    _import_once()
    import torch
    from espnet2.bin.asr_inference import Speech2Text

    from espnet_mamba.data.audio import read_audio

    recogniser = Speech2Text(str(folder / "config.yaml"), str(folder / model_file), nbest=1, lm_weight=0.0, **settings)
    text: dict[str, str] = {}
    failed: dict[str, str] = {}
    for count, utt in enumerate(utterances, start=1):
        try:
            with torch.inference_mode():
                best = recogniser(read_audio(utt.path))[0]
            text[utt.utt_id] = best[0] or ""
        except Exception as error:  # whatever goes wrong with one must not lose the others
            text[utt.utt_id] = ""
            failed[utt.utt_id] = f"{type(error).__name__}: {error}"
        print(f"decoded {count}/{len(utterances)} {utt.utt_id}", flush=True)
    write_json(out, {"text": text, "failed": failed})


def _score(asr_dir: Path, folders: list[Path], test_set: str, utterances: list[Utterance], shards: int) -> str:
    """Join the parts of each system, write its texts and scores, and compare the systems."""
    references = {utt.utt_id: utt.text for utt in utterances}
    results, hypotheses, notes = [], {}, []
    for folder in folders:
        work = folder / f"decode_{test_set}"
        parts = [read_json(work / f"part{shard}.json") for shard in range(shards)]
        joined = {utt: hyp for part in parts for utt, hyp in part["text"].items()}
        failed = {utt: reason for part in parts for utt, reason in part["failed"].items()}
        texts = {utt: joined[utt] for utt in references}
        write_table(work / "text", texts)
        write_table(work / "ref", references)
        write_json(work / "failed.json", failed)
        result = scoring.score(folder.name, references, texts) | {"num_failed": len(failed), "test_set": test_set}
        scoring.write_results(folder, references, texts, result)
        results.append(result)
        hypotheses[folder.name] = texts
        notes += [f"{folder.name}: {utt} failed and counts as empty: {reason}" for utt, reason in failed.items()]
    lines = [scoring.table(results)]
    if "random" in hypotheses and len(hypotheses) > 1:
        comparison = scoring.compare(references, hypotheses, "random")
        write_json(asr_dir / "comparison.json", comparison)
        lines += [_difference(name, value) for name, value in comparison["differences"].items()]
    return "\n".join([*lines, *notes])


def _difference(name: str, value: dict[str, float]) -> str:
    return f"WER {name} - random: {100 * value['value']:+.1f} [{100 * value['low']:+.1f}, {100 * value['high']:+.1f}]"


def progress(log: str) -> str | None:
    """Return how far a decoding is, from the end of its log."""
    found = re.findall(r"decoded (\d+)/(\d+) ", log)
    return f"{found[-1][0]} of {found[-1][1]} utterances" if found else None


def score_text(ref: Path, hyp: Path, out: Path) -> str:
    """Score one Kaldi-style ``text`` against another; write ``score.json`` into ``out`` and return a table."""
    references, hypotheses = (read_table(path, allow_empty=True) for path in (ref, hyp))
    result = scoring.score(out.name, references, hypotheses)
    scoring.write_results(out, references, hypotheses, result)
    return scoring.table([result])
