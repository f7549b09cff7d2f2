"""Downstream speech recognition with ESPnet on top of a frozen upstream."""

from espnet_mamba import offline

offline.prepare()
