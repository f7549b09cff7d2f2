"""The README says what is true: its table is the engine's, and each of its commands is run by a test."""

import re
import shlex
import subprocess
import sys

import pytest

from espnet_mamba.recipe.table import read_table

# Commands of the README and the test that runs each, by the words it starts with.
RUN_BY = {
    "./egs2/mini/ssl1/run.sh --corpus_dir": "test_end_to_end.py: test_own_corpus",
    "./egs2/mini/ssl1/run.sh": "test_end_to_end.py: test_all_stages",
    "./utils/run_tests.sh": "continuous integration: .ci/run is this command",
    "cd egs2/mini/ssl1": "test_recipe.py: engine",
    "./run.sh --help": "test_recipe.py: test_help_lists_every_stage_of_the_table",
    "./run.sh --stage pretrain2 --stop_stage upstream": "test_end_to_end.py: test_some_stages_again",
    "./run.sh --model ssamba_mini": "test_end_to_end.py: test_ssamba_from_speech_to_upstream",
    "./run.sh --stage superb --stop_stage superb": "test_end_to_end.py: test_some_stages_again",
    "utils/new_recipe.sh": "test_data_recipes.py",
    "python -m espnet_mamba.bin.convert_checkpoint --help": "test_readme.py: test_small_commands",
    "python -m espnet_mamba.bin.doctor": "test_readme.py: test_small_commands",
    "python -m espnet_mamba.bin.analyse --help": "test_readme.py: test_small_commands",
    "python -m espnet_mamba.bin.plot_layers --help": "test_readme.py: test_small_commands",
    "python -m espnet_mamba.bin.calibrate --help": "test_readme.py: test_small_commands",
}


@pytest.fixture(scope="module")
def readme(root):
    return (root / "README.md").read_text()


def test_stage_table_is_the_engines(readme, root):
    rows = re.findall(r"^\| (\d+) \| (\S+) \| (.*) \|$", readme, flags=re.M)
    table = read_table(root / "egs2/TEMPLATE/ssl1/stages.tsv")
    assert rows == [(str(stage.number), stage.name, stage.purpose) for stage in table]


def test_every_command_is_run_somewhere(readme, root):
    blocks = re.findall(r"```bash\n(.*?)```", readme, flags=re.S)
    commands = [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]
    assert len(commands) >= len(RUN_BY)
    for command in commands:
        where = [place for start, place in RUN_BY.items() if command.startswith(start)]
        assert where, f"no test runs the README's command {command!r}"
        name, _, test = where[0].partition(": ")
        if name.endswith(".py"):
            assert f"def {test}" in (root / "tests" / name).read_text(), command


def test_files_and_options_that_it_names_exist(readme, root):
    for path in re.findall(r"`((?:docs|conf|egs2|utils|espnet_mamba|s3prl_upstream)/[\w./]*)`", readme):
        assert (root / path).exists() or "/exp/" in path, path
    help_text = subprocess.run([root / "egs2/mini/ssl1/run.sh", "--help"], capture_output=True, text=True).stdout
    for block in re.findall(r"```bash\n(.*?)```", readme, flags=re.S):
        for word in shlex.split(block, comments=True):
            if word.startswith("--") and word != "--help":
                assert f"  {word} " in help_text, word


def test_models_table_names_every_model(readme, root):
    for path in (root / "conf/models").glob("*.yaml"):
        family = re.sub(r"_(tiny|small|base)(_paper|_matched)?$", "", path.stem)
        assert f"`{family}`" in readme, path


HELP = ["convert_checkpoint", "model_info", "analyse", "plot_layers", "calibrate"]


@pytest.mark.parametrize("command", ["doctor", *(f"{name} --help" for name in HELP)])
def test_small_commands(command, root):
    words = [sys.executable, "-m", *f"espnet_mamba.bin.{command}".split()]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) > 3, done.stderr
    if command == "doctor":
        assert re.search(r"^selective_scan on cpu, float32 +(cpu|torch) ", done.stdout, flags=re.M)
