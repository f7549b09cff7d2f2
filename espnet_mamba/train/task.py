"""HuBERT pretraining as an ESPnet Task: all of ESPnet's options, plus the few that shape the model and its targets."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from espnet2.tasks.abs_task import AbsTask, IteratorOptions, optim_classes, scheduler_classes
from espnet2.train.dataset import DATA_TYPES
from espnet2.utils.nested_dict_action import NestedDictAction

from espnet_mamba.data.audio_list import SOUND_HELP, AudioList
from espnet_mamba.data.bad_items import BadItem
from espnet_mamba.data.manifest import changed_audio
from espnet_mamba.models.config import HubertConfig, config_from_dict, config_to_dict, load_config
from espnet_mamba.models.pretraining import HubertForPretraining
from espnet_mamba.targets.labels import FrameLabels
from espnet_mamba.train.batches import add_arguments as add_batch_arguments
from espnet_mamba.train.batches import build_batches
from espnet_mamba.train.collate import HubertCollate
from espnet_mamba.train.espnet_model import ESPnetHubertModel
from espnet_mamba.train.iterators import StepIterFactory
from espnet_mamba.train.label_check import check_labels
from espnet_mamba.train.optimizers import build_optimizer
from espnet_mamba.train.schedules import PolynomialWarmup
from espnet_mamba.train.signals import passed_on_to_children
from espnet_mamba.train.trainer import StepTrainer
from espnet_mamba.train.unreadable import Unreadable

# On import, so that a spawned worker, which imports this module for the Task it is handed, has them too.
DATA_TYPES["frame_labels"] = {"func": FrameLabels, "kwargs": [], "help": "labels of espnet_mamba's targets stages"}
DATA_TYPES["sound"] = {"func": AudioList, "kwargs": [], "help": SOUND_HELP}
scheduler_classes["polynomial_warmup"] = PolynomialWarmup


# ESPnet's options that StepTrainer has no use for: given, they are refused, since ignoring them would mislead.
UNREAD = (
    "max_epoch patience keep_nbest_models nbest_averaging_interval grad_noise no_forward_run use_wandb sharded_ddp "
    "use_deepspeed use_adapter multiple_iterator iterator_type ddp_comm_hook"
).split()


class HubertTask(AbsTask):
    """``python -m espnet_mamba.bin.hubert_train``: raw audio and frame labels in, a pretrained model out."""

    num_optimizers = 1
    class_choices_list: list[Any] = []
    trainer = StepTrainer

    @classmethod
    def main(cls, args: argparse.Namespace | None = None, cmd: Sequence[str] | None = None) -> None:
        """Train; signals that ask for an end reach the processes that ESPnet starts for several GPUs."""
        with passed_on_to_children():
            super().main(args, cmd)

    @classmethod
    def add_task_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add what this task has beyond ESPnet's own options."""
        group = parser.add_argument_group(description="HuBERT pretraining")
        group.add_argument("--model", required=False, help="a model's YAML, e.g. conf/models/extbimamba_tiny.yaml")
        group.add_argument("--model_conf", action=NestedDictAction, default={}, help="fields that override the YAML's")
        group.add_argument("--num_classes", type=int, default=100, help="K, the number of clusters in the labels")
        group.add_argument("--label_rate", type=int, default=50, choices=(50, 100), help="labels per second")
        group.add_argument("--mask_prob", type=float, default=0.8, help="0.8 masks 55 %% of frames: spans overlap")
        group.add_argument("--mask_length", type=int, default=10, help="frames of a span")
        group.add_argument("--feature_penalty_weight", type=float, default=10.0, help="of the mean squared features")
        group.add_argument("--max_crop_samples", type=int, default=250_000, help="longest training crop (15.6 s)")
        add_batch_arguments(group)

    @classmethod
    def check_required_command_args(cls, args: argparse.Namespace) -> None:
        """Check what ESPnet checks, and that no option was given that this trainer does not read.

        Raises:
            ValueError: names the options and what to use for a length.
        """
        super().check_required_command_args(args)
        parser = cls.get_parser()
        given = [f"--{name}" for name in UNREAD if getattr(args, name) != parser.get_default(name)]
        if given:
            raise ValueError(f"{' '.join(given)}: not read in pretraining; a run's length is --max_steps updates")
        if args.train_dtype != "float32":  # A_log, D, step sizes, moments
            raise ValueError(
                f"--train_dtype {args.train_dtype}: weights stay in float32; give --use_amp true for speed"
            )

    @classmethod
    def build_collate_fn(cls, args: argparse.Namespace, train: bool) -> Callable[..., Any]:
        """Return the collate function of training (crops) or validation (pads)."""
        batch_type = args.batch_type if train else args.valid_batch_type or args.batch_type
        packed = batch_type == "packed"
        return HubertCollate(args.label_rate, args.seed, train, args.max_crop_samples, packed=packed)

    @classmethod
    def build_preprocess_fn(cls, args: argparse.Namespace, train: bool) -> None:
        """Return None: audio and labels go in as they are read."""
        return None

    @classmethod
    def required_data_names(cls, train: bool = True, inference: bool = False) -> tuple[str, ...]:
        """Return the names a data line may bear."""
        return ("speech", "labels")

    @classmethod
    def optional_data_names(cls, train: bool = True, inference: bool = False) -> tuple[str, ...]:
        """Return none."""
        return ()

    @classmethod
    def build_model(cls, args: argparse.Namespace) -> ESPnetHubertModel:
        """Build the model that ``--model`` and ``--model_conf`` describe; fills in the schedule's length.

        Raises:
            FileNotFoundError, ValueError: an unknown model (the nearest one is named) or field.
        """
        config = read_model_config(args.model, args.model_conf)
        if args.scheduler == "polynomial_warmup":  # the decay must end where training does
            args.scheduler_conf.setdefault("total_steps", args.max_steps)
        model = HubertForPretraining(config, args.num_classes, args.mask_prob, args.mask_length)
        return ESPnetHubertModel(model, args.feature_penalty_weight)

    @classmethod
    def build_optimizers(cls, args: argparse.Namespace, model: torch.nn.Module) -> list[torch.optim.Optimizer]:
        """Build ``--optim``, fused where it can be, with weight decay where it belongs (``train/optimizers.py``).

        Raises:
            ValueError: an unknown ``--optim``.
        """
        if args.optim not in optim_classes:
            raise ValueError(f"--optim {args.optim}: not one of: {' '.join(optim_classes)}")
        decayed = args.exclude_weight_decay_conf
        return [
            build_optimizer(model, optim_classes[args.optim], args.optim_conf, args.exclude_weight_decay, **decayed)
        ]

    @classmethod
    def check_data(cls, args: argparse.Namespace, iter_options: IteratorOptions, set_name: str) -> list[BadItem]:
        """Check a set before the first step: its labels fit its audio. Return the utterances to train without.

        Raises:
            ValueError: names the utterances whose labels do not.
        """
        paths = {name: path for path, name, _ in iter_options.data_path_and_name_and_type}
        return check_labels(paths["labels"], iter_options.shape_files[0], args.label_rate, set_name)

    @classmethod
    def build_sequence_iter_factory(
        cls, args: argparse.Namespace, iter_options: IteratorOptions, mode: str
    ) -> StepIterFactory:
        """Cut the corpus into batches, and number them."""
        rank, world = 0, 1
        if iter_options.distributed:
            rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        row, turns = build_batches(args, iter_options, rank, world)
        bad = cls.check_data(args, iter_options, mode)
        dataset = cls.build_dataset(args, iter_options)
        recordings = dataset.loader_dict["speech"]
        looked_at = rank == 0 and isinstance(recordings, AudioList)
        if looked_at and (changed := changed_audio(recordings.folder, recordings.locations)):
            logging.warning(changed)  # not an error: what cannot be read is left out
        unreadable = Unreadable(Path(args.output_dir), len(recordings), args.max_unreadable)
        unreadable.add(bad)
        return StepIterFactory(
            dataset,
            row,
            iter_options.collate_fn,
            train=iter_options.train,
            num_iters_per_epoch=iter_options.num_iters_per_epoch,
            num_workers=args.num_workers,
            pin_memory=args.ngpu > 0,
            turns=turns,
            unreadable=unreadable,
            set_name=mode,
        )


def read_model_config(path: str | None, overrides: dict[str, Any]) -> HubertConfig:
    """Read a model's YAML with ``overrides`` on top.

    Raises:
        ValueError: no model is given, or an unknown field.
        FileNotFoundError: no such file.
    """
    if not path:
        raise ValueError("--model is missing; give a model's YAML, e.g. --model conf/models/extbimamba_tiny.yaml")
    config = load_config(path)
    return config_from_dict(config_to_dict(config) | overrides, "--model_conf") if overrides else config
