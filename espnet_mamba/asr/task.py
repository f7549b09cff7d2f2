"""ESPnet's ASR task with our front end, pre-encoder and encoder among its choices.

ESPnet looks its classes up in module-level tables, so they are completed here, where the importable subclass lives:
a worker process that unpickles the subclass imports this module and finds the same tables.
"""

from __future__ import annotations

from espnet2.tasks import asr
from espnet2.train.class_choices import ClassChoices
from espnet2.train.dataset import DATA_TYPES

from espnet_mamba.asr.conbimamba_encoder import ConBiMambaEncoder
from espnet_mamba.asr.frontend import FrozenS3prlFrontend
from espnet_mamba.asr.preencoder import StackedLinear
from espnet_mamba.data.audio_list import SOUND_HELP, AudioList


def _add(choices: ClassChoices, name: str, added: type) -> None:
    """Add a class to one of ESPnet's tables; ValueError when the name is already another class's."""
    if choices.classes.setdefault(name, added) is not added:
        raise ValueError(f"--{choices.name} {name} is already {choices.classes[name]}; another extension took the name")


_add(asr.frontend_choices, "frozen_s3prl", FrozenS3prlFrontend)
_add(asr.preencoder_choices, "stacked_linear", StackedLinear)
_add(asr.encoder_choices, "conbimamba", ConBiMambaEncoder)
DATA_TYPES["sound"] = {"func": AudioList, "kwargs": [], "help": SOUND_HELP}


class ASRTask(asr.ASRTask):
    """ESPnet's task; entering through it makes the registrations above hold in every process."""
