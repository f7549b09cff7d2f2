"""SSAMBA pretraining as an ESPnet Task: raw audio in, no labels."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from espnet2.tasks.abs_task import IteratorOptions
from espnet2.utils.nested_dict_action import NestedDictAction

from espnet_mamba.data.bad_items import BadItem
from espnet_mamba.models.ssamba.config import SsambaConfig, config_from_dict, config_to_dict, load_config
from espnet_mamba.models.ssamba.pretraining import SsambaForPretraining
from espnet_mamba.train.batches import add_arguments as add_batch_arguments
from espnet_mamba.train.ssamba_model import ESPnetSsambaModel, SsambaCollate
from espnet_mamba.train.ssamba_trainer import SsambaTrainer
from espnet_mamba.train.task import HubertTask


class SsambaTask(HubertTask):
    """``python -m espnet_mamba.bin.ssamba_train``: raw audio in, a pretrained model out."""

    trainer = SsambaTrainer

    @classmethod
    def add_task_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add what this task has beyond ESPnet's own options."""
        group = parser.add_argument_group(description="SSAMBA pretraining")
        group.add_argument("--model", required=False, help="a model's YAML, e.g. conf/ssamba/ssamba_mini.yaml")
        group.add_argument("--model_conf", action=NestedDictAction, default={}, help="fields that override the YAML's")
        group.add_argument("--max_crop_samples", type=int, default=164_080, help="longest training crop (10.24 s)")
        add_batch_arguments(group)

    @classmethod
    def check_required_command_args(cls, args: argparse.Namespace) -> None:
        """Check what HuBERT's task checks, and that batches are not packed.

        Raises:
            ValueError: names the options and what to use instead.
        """
        super().check_required_command_args(args)
        if "packed" in (args.batch_type, args.valid_batch_type):
            raise ValueError("--batch_type packed: SSAMBA's patches cannot be packed into rows; use --batch_type numel")

    @classmethod
    def build_collate_fn(cls, args: argparse.Namespace, train: bool) -> Callable[..., Any]:
        """Return the collate function of training (crops) or validation (pads)."""
        config = read_model_config(args.model, args.model_conf)
        return SsambaCollate(args.seed, train, config.patch_size[1], args.max_crop_samples)

    @classmethod
    def required_data_names(cls, train: bool = True, inference: bool = False) -> tuple[str, ...]:
        """Return the names a data line may bear."""
        return ("speech",)

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> ESPnetSsambaModel:
        """Build the model that ``--model`` and ``--model_conf`` describe; fills in the schedule's length.

        Raises:
            FileNotFoundError, ValueError: an unknown model (the nearest one is named) or field.
        """
        config = read_model_config(args.model, args.model_conf)
        if args.scheduler == "polynomial_warmup":
            args.scheduler_conf.setdefault("total_steps", args.max_steps)
        return ESPnetSsambaModel(SsambaForPretraining(config))

    @classmethod
    def check_data(cls, args: argparse.Namespace, iter_options: IteratorOptions, set_name: str) -> list[BadItem]:
        """Check nothing: there are no labels."""
        return []


def read_model_config(path: str | None, overrides: dict[str, Any]) -> SsambaConfig:
    """Read a model's YAML with ``overrides`` on top.

    Raises:
        ValueError: no model is given, an unknown field or a value that cannot be.
        FileNotFoundError: no such file.
    """
    if not path:
        raise ValueError("--model is missing; give a model's YAML, e.g. --model conf/ssamba/ssamba_mini.yaml")
    config = load_config(path)
    return config_from_dict(config_to_dict(config) | overrides, "--model_conf") if overrides else config
