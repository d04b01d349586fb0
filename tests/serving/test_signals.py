"""SIGTERM lets running texts end within the grace time, in a process of its own."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.http import PATIENCE
from tests.serving.test_server import BODY, send

pytest.importorskip("uvicorn")

SCRIPT = """
import sys, time
import pyspec
from pyspec.cli import main
from tests.helpers.talking_llama import talking_llama

model = talking_llama()
verify = model.verify
model.verify = lambda trees: time.sleep(0.03) or verify(trees)
pyspec.load = lambda source, **options: model
sys.exit(main(["serve", "--model", "small", "--port", "0", "--budget", "1", "--drafter", "none", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("grace", [PATIENCE, 0])
def test_sigterm_lets_running_texts_end_within_the_grace_time(grace):
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "--grace", str(grace)],
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        for line in process.stderr:
            if found := re.search(rb"running on http://(127.0.0.1:\d+)", line):
                break
        address = found[1].decode()
        body = BODY | {"stream": True, "max_tokens": 60, "logit_bias": {"96": -100}}
        with send(address, body) as connection, connection.makefile("rb") as stream:
            lines = iter(stream.readline, b"")
            assert any(b'"text"' in line for line in lines)
            process.send_signal(signal.SIGTERM)
            rest = b"".join(lines)
        _, err = process.communicate(timeout=PATIENCE)
        if grace:
            assert b"[DONE]" in rest and b'"finish_reason":"length"' in rest
        else:
            error = json.loads(re.search(rb"data: (\{\"error.*)", rest)[1])["error"]
            assert error["code"] == "closing" and b"[DONE]" not in rest
        assert process.returncode in (0, -signal.SIGTERM) and b"Traceback" not in err
        with pytest.raises(OSError):
            send(address, BODY)
    finally:
        process.kill()
        process.communicate()
