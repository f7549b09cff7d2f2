"""Runs in forks of this process that are disturbed on the way; benchmarks/kill_test.py makes and compares them."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from kill_test import KillTest, fork, result, same, wait  # noqa: F401

STEPS = 12  # epochs of 8, checkpoints after 3, 6, 8, 9, 12


def start(test, name, *extra, before=lambda: None, **environment):
    """Start a run in a fork; ``before`` is called in the child first."""

    def run():
        from espnet_mamba.train.ssamba_task import SsambaTask
        from espnet_mamba.train.task import HubertTask

        os.environ.update(environment)
        before()
        task = HubertTask if test.objective == "hubert" else SsambaTask
        task.main(cmd=[*test.command(test.work / name), *map(str, extra)])

    return fork(run, test.work / f"{name}.log")


def log_of(test, name):
    return (test.work / f"{name}.log").read_text()


def at_step(wanted, action):
    """Return what makes a child call ``action(run)`` before update ``wanted``."""

    def patch():
        from espnet_mamba.train.trainer import TrainingRun

        update = TrainingRun._update

        def acting(self, step, *args):
            if step == wanted:
                action(self)
            return update(self, step, *args)

        TrainingRun._update = acting

    return patch


def poison(steps, module="blocks.1"):
    """Return what makes a child's ``module`` put out an infinity in the updates ``steps``."""

    def patch():
        from espnet_mamba.train.trainer import TrainingRun

        update = TrainingRun._update

        def poisoned(self, step, *args):
            if step not in steps:
                return update(self, step, *args)

            def spoil(_module, _inputs, output):
                value = output[0] if isinstance(output, tuple) else output
                value.data[0, 0, 0] = float("inf")

            self.spoiled = self.model.model.hubert.get_submodule(module).register_forward_hook(spoil, prepend=True)
            return update(self, step, *args)

        TrainingRun._update = poisoned
        count = TrainingRun._count_bad_step

        def counted(self, *args):
            try:
                count(self, *args)
            finally:
                if hasattr(self, "spoiled"):
                    self.spoiled.remove()

        TrainingRun._count_bad_step = counted

    return patch
