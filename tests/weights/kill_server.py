"""Runs that are killed. As a program: forks a process for each request on standard input and says how it ended.

A program of its own, started with one OpenMP thread: forking a process that has already computed with several hangs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from trimtab.models.calibration_set import CalibrationSet
from trimtab.models.compression import compress_to
from trimtab.models.random import random_model
from trimtab.weights.gptq import Gptq

GPTQ = Gptq(bits=3, group_size=16)
LAYERS = 3


def small_calibration() -> CalibrationSet:
    """8 sequences of 24 tokens for the random models (131 tokens)."""
    tokens = torch.randint(3, 131, (8, 24), generator=torch.Generator().manual_seed(7))
    return CalibrationSet.from_tokens(tokens, source="random tokens")


def run(output: Path, **settings: Any) -> Any:
    """Compress a random model of three blocks to `output`."""
    settings = {"method": GPTQ, "calibration": small_calibration(), "progress": False, **settings}
    return compress_to(random_model("llama", num_hidden_layers=LAYERS), settings.pop("method"), output, **settings)


class Kill:
    """Kills this process before the n-th time that it opens, makes, renames or removes something in `directory`."""

    EVENTS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"})

    def __init__(self, directory: str, at: int) -> None:
        self.directory = directory
        self.left = at
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in self.EVENTS and any(
            isinstance(a, (str, os.PathLike)) and self.directory in str(a) for a in arguments
        ):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class KillServer:
    """Client of the program: `killed(directory, at, ...)` compresses to `directory / "out"` in a process of its own."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", __name__]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def killed(self, directory: Path, at: int, **settings: Any) -> bool:
        """True if it was killed at the given point, False if it came to its end before."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"directory": str(directory), "at": at, "settings": settings}) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        assert status in (0, -signal.SIGKILL)
        return status != 0

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            Kill(request["directory"], request["at"])
            run(Path(request["directory"]) / "out", **request["settings"])
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
