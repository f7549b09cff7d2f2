"""Pretraining through ESPnet: its options, its Task and Trainer, subclassed where HuBERT needs more."""

from espnet_mamba import offline

offline.prepare()
