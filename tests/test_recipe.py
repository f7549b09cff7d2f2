import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from espnet_mamba.recipe.fingerprint import command_options, differences
from espnet_mamba.recipe.process import exclusive, run_logged
from espnet_mamba.recipe.runner import StageFailedError, run_stage
from espnet_mamba.recipe.table import find_stage, maker_of, read_table

ROOT = Path(__file__).resolve().parents[1]
HEADER = "number\tname\tgroup\twork_dir\tneeds\tmakes\tpurpose\n"


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "stages.tsv"
    path.write_text(HEADER + "1\tone\ttrain\t\t\t${d}/a\tfirst\n2\ttwo\ttrain\t${d}/w\t${d}/a\t${d}/w/b\tsecond\n")
    return read_table(path)


def make(tmp_path, table, name, *words):
    code = "import sys,pathlib; p=pathlib.Path(sys.argv[1]); p.parent.mkdir(exist_ok=True); p.write_text('x')"
    out = tmp_path / ("a" if name == "one" else "w/b")
    command = [sys.executable, "-c", code, str(out), *words]
    return run_stage(table, find_stage(table, name), {"d": str(tmp_path)}, tmp_path / "stages", command)


def test_done_is_skipped_and_changes_are_named(tmp_path, table, capsys):
    assert make(tmp_path, table, "one", "--seed", "0")
    assert not make(tmp_path, table, "one", "--seed", "0")
    assert "skipped" in capsys.readouterr().out
    assert not make(tmp_path, table, "one", "--seed", "0", "--nj", "7")  # only speed changed
    assert make(tmp_path, table, "one", "--seed", "1")
    assert "runs again, since --seed was '0', now '1'" in capsys.readouterr().out
    (tmp_path / "a").unlink()
    assert make(tmp_path, table, "one", "--seed", "1")
    assert "a is missing" in capsys.readouterr().out


def test_changed_input_reruns_and_sets_the_old_work_aside(tmp_path, table, capsys):
    make(tmp_path, table, "one")
    assert make(tmp_path, table, "two")
    os.utime(tmp_path / "a", (1, 1))
    assert not make(tmp_path, table, "two")  # touched, not changed
    (tmp_path / "a").write_text("y")
    assert make(tmp_path, table, "two")
    assert f"input {tmp_path / 'a'} changed" in capsys.readouterr().out
    assert len(list(tmp_path.glob("w.before_*"))) == 1


def test_missing_input_names_the_stage_that_makes_it(tmp_path, table):
    with pytest.raises(FileNotFoundError, match=r"stage 2 .two. needs .*/a, .* stage 1 .one. makes it"):
        make(tmp_path, table, "two")


def test_what_an_empty_variable_names_is_not_part_of_the_run(tmp_path):
    path = tmp_path / "stages.tsv"
    path.write_text(HEADER + "1\tone\ttrain\t\t${labels}/x ${d}\t${d}/a ${labels}/${d}\tfirst\n")
    (stage,) = table = read_table(path)
    variables = {"d": str(tmp_path), "labels": ""}
    assert stage.expand(stage.needs, variables) == [tmp_path] and stage.expand(stage.makes, variables) == [
        tmp_path / "a"
    ]
    code = f"open({str(tmp_path / 'a')!r}, 'w').close()"
    assert run_stage(table, stage, variables, tmp_path / "stages", [sys.executable, "-c", code])
    with pytest.raises(FileNotFoundError, match="stage 1 .one. needs /none/x, which is missing"):
        run_stage(table, stage, variables | {"labels": "/none"}, tmp_path / "stages", [sys.executable, "-c", code])
    with pytest.raises(KeyError, match="labels"):
        stage.expand(stage.needs, {"d": str(tmp_path)})


def test_failure_is_recorded_and_the_next_run_resumes(tmp_path, table, capsys):
    make(tmp_path, table, "one")
    stage = find_stage(table, "two")
    command = [sys.executable, "-c", f"import os,sys; sys.exit(0 if os.path.exists('{tmp_path}/go') else 3)"]
    run = lambda: run_stage(table, stage, {"d": str(tmp_path)}, tmp_path / "stages", command)  # noqa: E731
    with pytest.raises(StageFailedError, match="exit status 3"):
        run()
    (tmp_path / "go").touch()
    with pytest.raises(StageFailedError, match="did not make .*w/b"):
        run()
    assert "resumes" in capsys.readouterr().out
    (tmp_path / "w").mkdir()
    (tmp_path / "w/b").touch()
    assert run()
    assert json.loads((tmp_path / "stages/02_two.json").read_text())["status"] == "done"


def test_record_script_repeats_the_command(tmp_path, table):
    make(tmp_path, table, "one", "--text", "two words")
    (tmp_path / "a").unlink()
    subprocess.run(["bash", tmp_path / "stages/01_one.sh"], check=True)
    assert (tmp_path / "a").read_text() == "x"
    record = json.loads((tmp_path / "stages/01_one.json").read_text())
    assert record["seconds"] > 0 and "'two words'" in record["command"]


def test_memory_of_children_is_seen(tmp_path):
    grandchild = "x = b'1' * 300_000_000; import time; time.sleep(1.5)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    status, peak = run_logged([sys.executable, "-c", code], tmp_path / "log")
    assert status == 0 and (peak > 280 or not Path("/proc").exists())


def test_a_stage_runs_once_at_a_time(tmp_path):
    with exclusive(tmp_path / "x.lock", "stage 4 (pretrain1)"):
        code = "import pathlib; from espnet_mamba.recipe.process import exclusive\n"
        code += f"with exclusive(pathlib.Path({str(tmp_path / 'x.lock')!r}), 'stage 4 (pretrain1)'): pass"
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert f"stage 4 (pretrain1) is being run by process {os.getpid()}" in result.stderr
    with exclusive(tmp_path / "x.lock", "stage 4 (pretrain1)"):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_killing_the_runner_kills_its_command(tmp_path):
    inner = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = "import pathlib, sys; from espnet_mamba.recipe.process import exclusive, run_logged\n"
    code += f"run_logged([sys.executable, '-c', {inner!r}], pathlib.Path({str(tmp_path / 'log')!r}))"
    runner = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    runner.kill()
    runner.wait()
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}/exe").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}/exe").exists()


def test_options_are_compared_by_name():
    old = command_options(["/usr/bin/python3", "-m", "pkg.tool", "--a", "1", "2", "--nj", "3", "--b", "x", "--b", "y"])
    assert old == {"program": "pkg.tool", "--a": "1 2", "--b": "x", "--b#2": "y"}
    new = command_options(["python", "-m", "pkg.tool", "--a", "1", "--b", "x", "--b", "y"])
    assert differences(old, new, {}, {}) == ["--a was '1 2', now '1'"]


def test_shipped_table_is_complete(root):
    table = read_table(root / "egs2/TEMPLATE/ssl1/stages.tsv")
    assert [stage.number for stage in table] == list(range(1, 14))
    for stage in table:
        for need in stage.needs:
            maker = maker_of(table, need)
            assert maker is not None and maker.number < stage.number, (stage.name, need)
    with pytest.raises(ValueError, match="did you mean 'targets1'"):
        find_stage(table, "target1")


def engine(root, *options, cwd=None):
    return subprocess.run(
        [str(root / "egs2/mini/ssl1/run.sh"), *options],
        capture_output=True,
        text=True,
        env=os.environ | {"ESPNET_MAMBA_NO_SETUP": "1"},
    )


def test_help_lists_every_stage_of_the_table(root):
    text = engine(root, "--help").stdout
    for stage in read_table(root / "egs2/TEMPLATE/ssl1/stages.tsv"):
        assert f"{stage.number:4d}  {stage.name:<11} {stage.purpose}" in text
    assert "--bad_audio" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--modle", "x"], "unknown option --modle; did you mean --model?"),
        (["--model", "extbimamba_tny"], "did you mean extbimamba_tiny?"),
        (["--model", "samba_tiny"], "did you mean ssamba_tiny?"),
        (["--stage", "pretrain3"], "no stage 'pretrain3'"),
        (["--corpus_dir", "/nowhere/at/all"], "no such folder"),
        (["--nj"], "--nj needs a value"),
        (["stray"], "unexpected argument 'stray'"),
        (["--skip_pretran1", "true"], "did you mean --skip_pretrain1?"),
    ],
)
def test_engine_refuses_by_name(root, options, message):
    result = engine(root, *options)
    assert result.returncode == 2 and message in result.stderr


def test_engine_runs_skips_and_names_missing_stages(root, tmp_path):
    where = ["--minutes", "2", "--expdir", tmp_path / "exp", "--datadir", tmp_path / "d", "--dumpdir", tmp_path / "u"]
    where = [str(word) for word in where]
    result = engine(root, *where, "--stage", "pretrain2", "--stop_stage", "6")
    assert result.returncode == 2 and "stage 2 (check) makes it" in result.stderr
    result = engine(root, *where, "--stop_stage", "check")
    assert result.returncode == 0, result.stderr
    result = engine(root, *where, "--stop_stage", "check")
    assert result.stdout.count("skipped") == 2
    result = engine(root, *where, "--stop_stage", "check", "--skip_data", "true", "--bad_audio=skip")
    assert "stage 1 (data): skipped, as asked" in result.stdout
    assert "runs again, since --bad_audio was 'refuse', now 'skip'" in result.stdout
    shutil.rmtree(tmp_path / "d/train")
    result = engine(root, *where, "--stop_stage", "check", "--skip_data", "true")
    assert result.returncode == 2 and "stage 1 (data) makes it" in result.stderr
