"""The command line's frame: help, exit codes, one clear paragraph, JSON on stdout, signals."""

import errno
import json
import math
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import scbert
from scbert.commands import cli, console
from scbert.extras import MissingLibrary
from scbert.tokenization import InputError

VERBS = [command.name or command.callback.__name__ for command in cli.app.registered_commands]
EXPECTED = {"demo", "finetune", "annotate", "embed", "convert", "gene2vec"}


def fail_with(error):
    def job(*_, **__):
        raise error

    return job


def guarded_failure(error):
    return console.guarded(lambda: console.run(fail_with(error), json=False))


def test_the_verbs_of_the_contract_exist():
    assert set(VERBS) >= EXPECTED


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    # where colours are forced, as on GitHub, an option's dashes and name are coloured apart
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert f"scbert {verb}" in printed
    assert "--json" in printed


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"scbert {scbert.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [["annotate"], ["no-such-verb"], ["annotate", "x.h5ad", "--threshold", "2"]]
)
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err


def test_a_missing_file_is_named_without_traceback(tmp_path, capsys):
    missing = tmp_path / "missing.h5ad"
    output = tmp_path / "out.h5ad"
    assert cli.main(["annotate", str(missing), "--model", str(tmp_path), "--output", str(output)]) == 1
    captured = capsys.readouterr()
    assert str(missing) in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert not output.exists()


def test_pushing_what_is_no_model_is_told(tmp_path, capsys):
    assert cli.main(["push", str(tmp_path), "somebody/model"]) == 1
    printed = capsys.readouterr().err
    assert "Error:" in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            InputError("query has [5] genes of the panel; mend it"),
            "query has [5] genes of the panel; mend it",
        ),
        (OSError("Unable to open file (truncated file)"), "truncated file"),
        (PermissionError(errno.EACCES, "Permission denied", "/out.h5ad"), "Permission denied: /out.h5ad"),
        (OSError(errno.ENOSPC, "No space left on device", "/out.h5ad"), "disk is full (/out.h5ad)"),
        (RuntimeError("write failed: errno = 28, No space left on device"), "disk is full"),
        (ModuleNotFoundError("No module named 'captum'", name="captum"), "pip install 'captum"),
        (MissingLibrary("evaluate is not installed: pip install"), "evaluate is not installed: pip install"),
        (MemoryError(), "--batch-size"),
    ],
)
def test_errors_that_a_user_can_mend(error, message, capsys):
    assert guarded_failure(error) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert len(printed.strip().splitlines()) == 1


def test_a_full_disk_is_seen_behind_other_errors(capsys):
    def job():
        try:
            with open("/dev/full", "w") as file:
                file.write("x")
        except OSError as error:
            raise RuntimeError("PytorchStreamWriter failed writing file") from error

    assert console.guarded(job) == 1
    assert "disk is full" in capsys.readouterr().err


def test_a_bug_shows_its_traceback(capsys):
    assert guarded_failure(ValueError("a bug")) == 1
    assert "Traceback" in capsys.readouterr().err


def test_debugging_shows_every_traceback(monkeypatch, capsys):
    monkeypatch.setenv("SCBERT_DEBUG", "1")
    assert guarded_failure(InputError("what was found")) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert "Error: what was found" in printed


def test_json_is_the_only_line_on_stdout(capsys):
    def job(path, threshold=0.5, layer="X"):
        print("chatter")
        return {
            "cells": np.int64(3),
            "share": np.float32(0.5),
            "nothing": math.nan,
            "layer": layer,
            "labels": ("é",),
        }

    console.run(job, path="file", json=True, threshold=0.1, layer=None)
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "cells": 3,
        "share": 0.5,
        "nothing": None,
        "layer": "X",
        "labels": ["é"],
    }
    assert captured.out.count("\n") == 1
    assert "chatter" in captured.err


def test_summary_for_people_goes_to_stderr(capsys):
    console.run(lambda: {"macro_f1": 0.98765432, "cells": 3, "output": "a.h5ad"}, json=False)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["macro f1: 0.9877", "cells: 3", "output: a.h5ad"]


def test_interrupted_by_keyboard(capsys):
    assert console.guarded(fail_with(KeyboardInterrupt())) == 130
    assert "Ctrl-C" in capsys.readouterr().err


def test_sigterm_cleans_up_and_exits_143(tmp_path):
    partial = tmp_path / "out.h5ad.partial"
    script = f"""
import sys, time
from pathlib import Path
from scbert.commands.console import guarded
partial = Path({str(partial)!r})
def job():
    try:
        partial.write_text("half")
        time.sleep(30)
    finally:
        partial.unlink()
sys.exit(guarded(job))
"""
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while not partial.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, printed = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "SIGTERM" in printed
    assert "Traceback" not in printed
    assert not partial.exists()


def test_help_imports_nothing_slow():
    script = (
        "import sys; from scbert.commands.cli import main; main(['--help']);"
        "sys.exit(bool({'torch', 'transformers', 'numpy', 'anndata'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 0


def test_module_runs_like_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "scbert", "--version"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0
    assert done.stdout.startswith("scbert ")


def test_old_spellings_are_understood_and_not_shown(tmp_path, capsys):
    missing, output = str(tmp_path / "none.h5ad"), str(tmp_path / "out")
    assert cli.main(["combine", missing, "--output", output]) == 1
    assert cli.main(["annotate", missing, "--output", f"{output}.h5ad", "--input", "counts"]) == 1
    told = capsys.readouterr().err
    assert "No such file" in told and "There is no file" in told
    assert cli.main(["annotate", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--values" in shown and "--input" not in shown
