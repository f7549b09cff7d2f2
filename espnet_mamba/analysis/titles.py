"""What measures, estimators and references are called on a figure, and what a reader must know of each measure."""

from __future__ import annotations

import re

_TITLES = {
    "mutual_information": "mutual information",
    "mutual_information_bias": "bias of the estimate",
    "phone_purity": "phone purity",
    "cluster_purity": "cluster purity",
    "pnmi": "phone-normalised mutual information",
    "used_clusters": "used clusters",
    "cca_mean": "mean CCA",
    "pwcca": "projection-weighted CCA",
    "cka": "linear CKA",
    "cka_debiased": "debiased linear CKA",
    "reconstruction": "reconstruction",
    "phone_accuracy": "phone accuracy",
    "speaker_accuracy": "speaker accuracy",
    "discrete_information": "information of k-means codes",
    "discrete_information_share": "relative information of k-means codes",
    "mine_paper": "published protocol (training frames)",
    "mine_paper_reuse": "published protocol, one critic reused (training frames)",
    "dv_heldout": "Donsker-Varadhan bound, held out",
    "infonce_heldout": "InfoNCE bound, held out",
    "smile_heldout": "SMILE, held out",
    "nwj_heldout": "NWJ bound, held out",
    "all_rows": "all frames",
    "ridge": "linear decoder (ridge), held out",
    "mlp": "ridge and one hidden layer, held out",
    "lda": "linear probe, held out",
    "logmel": "log-mel",
    "conv": "convolution output",
    "layer0": "layer 0",
    "phones_and_silence": "phones and silence",
    "phone_segments": "phone segments",
    "word": "words",
    "speaker": "speakers",
    "emotion": "emotions",
}
_SHORT = {
    "pnmi": "PNMI",
    "pwcca": "PWCCA",
    "mine_paper": "published protocol\n(training frames: no bound)",
    "mine_paper_reuse": "published protocol, critic reused\n(training frames: no bound)",
    "dv_heldout": "DV bound, held out",
    "ridge": "linear decoder, held out",
    "discrete_information": "information of codes",
    "mutual_information_bias": "bias of KSG",
}
_UNITS = {"R^2": "R²", "share of H": "share of the labels' entropy"}
_IMPLIED = {"phone_accuracy": "phones", "speaker_accuracy": "speakers", "phone_purity": "phones", "pnmi": "phones"}
_IMPLIED |= {"cluster_purity": "phones", "used_clusters": "phones"}  # what the measure's own name says
_FLAGS = {
    "ceiling": "bent by the ceiling",
    "few_frames": "too few frames",
    "components": "components hold < 90 % of the variance",
    "bias": "large bias",
}
_JOINERS = {"reconstruction": "of", "phone_accuracy": "of", "speaker_accuracy": "of", "used_clusters": "of"}
_CAPTIONS = {
    "mutual_information": "Mutual information of each layer with a reference, in nats. The held-out bounds are lower "
    "bounds on unseen utterances and cannot pass the dotted ceiling; where they reach it, the truth may be any larger "
    "value. The published protocol is evaluated on its own training frames, so that independent data give more than 0 "
    "too (dashed): only its distance from the dashed line says anything.",
    "mutual_information_bias": "What the nearest-neighbour estimator adds to (below 0: misses of) the known "
    "information of Gaussian frames with the same correlations; a value with a large bias is flagged.",
    "phone_purity": "Phone purity: share of frames that carry the commonest phone of their cluster. Silence is left "
    "out where the title does not name it. It grows with K by itself, so compare at one K and against the null.",
    "cluster_purity": "Cluster purity: share of frames that are in the commonest cluster of their phone.",
    "pnmi": "PNMI: share of the phones' entropy that the cluster removes.",
    "used_clusters": "Clusters that hold at least one frame of speech.",
    "pwcca": "Projection-weighted canonical correlation of a layer with log-mel or with one-hot labels, on utterances "
    "that neither the directions nor the regularisation were fitted on. The null is the 95 % line of shuffled "
    "utterances.",
    "cca_mean": "Mean canonical correlation, held out as the projection-weighted one.",
    "cka_debiased": "Linear centred kernel alignment over all frames, without the bias of few frames and wide layers: "
    "independent data give 0 on average. Nothing is fitted, so there is no held-out part.",
    "cka": "Linear centred kernel alignment as first published: too high for few frames and wide layers.",
    "reconstruction": "How well log-mel can be read back from a layer: R² on unseen utterances; below 0 the decoder "
    "is worse than the mean.",
    "phone_accuracy": "Share of held-out frames whose phone a linear probe names; chance is the commonest phone.",
    "speaker_accuracy": "Share of held-out utterances whose speaker a linear probe on the mean frame names; chance is "
    "the commonest speaker.",
    "discrete_information": "Mutual information of a layer's k-means codes and labels: as counted (plug-in: too high) "
    "and corrected (Miller and Madow). Labels of other utterances give the dashed line.",
    "discrete_information_share": "The information as a share of the labels' entropy.",
}


def title_of(name: str, short: bool = False) -> str:
    """Return what a reader calls a measure, estimator or reference; an unknown name without its underscores."""
    if name.endswith("_per_utterance"):
        return f"{title_of(name.removesuffix('_per_utterance'), short)}, mean over single utterances"
    if short and name in _SHORT:
        return _SHORT[name]
    if name in _TITLES:
        return _TITLES[name]
    if found := re.fullmatch(r"kmeans(\d+)(?:_(plugin|miller_madow))?", name):
        kind = {"plugin": ", as counted", "miller_madow": ", bias-corrected"}.get(found[2] or "", "")
        return f"K = {found[1]}{kind}"
    if found := re.fullmatch(r"ksg(\d+)", name):
        return f"nearest neighbours (KSG), {found[1]} components"
    if found := re.fullmatch(r"heldout_(\d+)folds", name):
        return f"held out, {found[1]} folds"
    return name.replace("_", " ")


def heading(measure: str, reference: str, short: bool = False) -> str:
    """Return measure and reference in words: ``mutual information with log-mel``."""
    name = title_of(measure, short)
    if _IMPLIED.get(measure) == reference:
        return name
    return f"{name} {_JOINERS.get(measure, 'with')} {title_of(reference, short)}"


def axis_label(measure: str, unit: str, short: bool = False) -> str:
    """Return the label of the y axis, with the unit in brackets."""
    shown = _UNITS.get(unit, unit)
    if measure == "discrete_information_share":
        return "share of the entropy"
    name = "information" if short and "information" in measure else title_of(measure, short)
    return f"{name} ({shown})" if shown else name


def caption_of(measure: str) -> str:
    """Return what to know before reading a figure of ``measure``; empty for an unknown one."""
    return _CAPTIONS.get(measure, "")


def unit_of(unit: str) -> str:
    """Return a unit as written in a table."""
    return unit if unit == "share of H" else _UNITS.get(unit, unit)


def flag_in_words(flag: str) -> str:
    """Return why a value is not to be believed, in words; an unknown flag as it is."""
    return _FLAGS.get(flag, flag.replace("_", " "))
