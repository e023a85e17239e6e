"""The demo's own part: what Ctrl-C does to a command that it runs, and the table that it ends with."""

import json
import os
import signal
import subprocess
import sys
import time

from proxt2i.embedded import demo
from runs import ROOT

SAVES = "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: None); open(sys.argv[1], 'w').close(); signal.pause(); time.sleep(1); open(sys.argv[2], 'w').close(); sys.exit(130)"


def test_ctrl_c_waits_for_the_command_that_saves(tmp_path):
    started, saved = tmp_path / "started", tmp_path / "saved"
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from proxt2i.embedded.demo import call; call('training', {[sys.executable, '-c', SAVES, str(started), str(saved)]!r}); print('went on')"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"PYTHONPATH": str(ROOT)})
    deadline = time.monotonic() + 300
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output = process.communicate(timeout=300)[0]
    assert saved.exists() and process.returncode == 130
    assert "goes on from here" in output and "went on" not in output


def test_the_table_compares_the_two_evaluations(tmp_path):
    for name, right in (("a", 0.5), ("b", 0.75)):
        (tmp_path / name / "evaluation-grpo").mkdir(parents=True)
        row = {"accuracy": 0.9, "all_right": right, "frechet_distance": 3.0, "diversity": 1.25}
        (tmp_path / name / "evaluation-grpo" / "results.json").write_text(json.dumps({"num_prompts": 100, "rows": [{}, row]}))
    lines = demo.comparison({"before": tmp_path / "a", "after": tmp_path / "b"}).splitlines()
    assert len(lines) == 3 and "0.500 +- 0.050" in lines[1] and "0.750 +- 0.043" in lines[2]
