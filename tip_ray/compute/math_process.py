"""math-verify in a process of its own: a time limit that holds in any thread, whatever it computes.

The package's own limits are signals: they need a main thread, and wait for the interpreter to come
back from a computation in C. So the process takes them, and is itself killed where they fail.
"""

from __future__ import annotations

import atexit
import importlib
import os
import resource
import subprocess
import sys
import threading
from multiprocessing.connection import Connection, Pipe
from typing import Any

from tip_ray.compute.user_function import one_line
from tip_ray.contract.errors import SpecError

STEP_LIMIT_S = 5  # of each of three steps: parse the answer, parse the response, compare
START_LIMIT_S = 120.0  # importing it takes a second; on a busy machine more
LIMIT_BYTES = 8 << 30  # of address space: 10^10^10 has ten thousand million digits


class MathProcess:
    """Answers whether two expressions are the same mathematics; started at the first question.

    One question at a time: threads wait for each other.
    """

    def __init__(self, step_limit_s: int = STEP_LIMIT_S) -> None:
        self._step_limit_s = step_limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._line: Connection | None = None

    def same(self, response: str, answer: str) -> bool:
        """Whether `response` ends in what `answer`, LaTeX, says; False where it takes too long.

        Raises:
            SpecError: math-verify cannot be imported in a new process.
        """
        with self._lock:
            line = self._started()
            try:
                line.send((response, answer, self._step_limit_s))
                if line.poll(4 * self._step_limit_s):  # one more step than it has
                    return bool(line.recv())
            except (EOFError, OSError):
                pass  # it died of this question, of memory for one
            self._close()
            return False

    def close(self) -> None:
        """End the process; the next question starts another."""
        with self._lock:
            self._close()

    def _started(self) -> Connection:
        if self._process is not None and self._process.poll() is not None:
            self._close()  # something else ended it: no question's fault
        if self._line is None:
            self._line, theirs = Pipe()
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,  # its warnings of expressions that took too long
            )
            theirs.close()
            self._wait_until_ready(self._line)
        return self._line

    def _wait_until_ready(self, line: Connection) -> None:
        try:
            ready = line.recv() if line.poll(START_LIMIT_S) else "no answer"
        except (EOFError, OSError) as error:
            ready = type(error).__name__
        if ready != "ready":
            self._close()
            cure = "pip install math-verify"
            raise SpecError("scorer", f"'math' ({ready})", "math-verify in a new process", cure)

    def _close(self) -> None:
        if self._line is not None and self._process is not None:
            self._line.close()
            self._process.kill()
            self._process.wait()
        self._line = self._process = None


def _answer_questions(line: Connection) -> None:
    """The process's own loop; it ends with its parent, which closes the line."""
    _limit_memory()
    try:
        verifier = importlib.import_module("math_verify")
    except ImportError as error:
        line.send(one_line(error))
        return
    line.send("ready")
    while True:
        try:
            question = line.recv()
        except EOFError:
            return
        line.send(_same(verifier, *question))


def _limit_memory() -> None:
    if sys.platform == "linux":  # elsewhere the limit is of another meaning
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        limit = LIMIT_BYTES if most == resource.RLIM_INFINITY else min(LIMIT_BYTES, most)
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def _same(verifier: Any, response: str, answer: str, limit_s: int) -> bool:
    expected = verifier.parse(f"${answer}$", parsing_timeout=limit_s)
    found = verifier.parse(response, parsing_timeout=limit_s)
    return bool(verifier.verify(expected, found, timeout_seconds=limit_s))


MATH = MathProcess()
atexit.register(MATH.close)

if __name__ == "__main__":
    _answer_questions(Connection(int(sys.argv[1])))
