"""Python that has imported something once, and a fork of it for every piece of code."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import dedent

_SERVE = """
import json, os, sys

exec(sys.argv[1], globals())
while line := sys.stdin.readline():  # a loop over the file would read ahead
    said, own = os.pipe()
    if not (pid := os.fork()):
        os.dup2(own, 1)
        os.dup2(own, 2)
        os.closerange(3, 64)
        code = 1
        try:
            exec(json.loads(line), globals())
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(own)
    with os.fdopen(said) as file:
        text = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([code, text]), flush=True)
"""


class Prepared:
    """A process that has run some code, whose forks run more.

    What they import is theirs alone, as in a fresh process after the same code.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, *code: str) -> str:
        """What a fork prints, on both outputs; an AssertionError with that if it fails."""
        self._process.stdin.write(json.dumps(joined(code)) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that is forked has ended"
        code, said = json.loads(answer)
        assert code == 0, said
        return said.strip()


@contextmanager
def prepared(*code: str) -> Iterator[Prepared]:
    """A process that has run this code, until the block ends."""
    with subprocess.Popen(
        [sys.executable, "-c", _SERVE, joined(code)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        yield Prepared(process)
        process.stdin.close()


def joined(code: tuple[str, ...]) -> str:
    """Pieces of code, each indented as it may be, one below the other."""
    return "\n".join(dedent(part) for part in code)
