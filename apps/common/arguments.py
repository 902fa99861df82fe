"""Command lines of programs that a launcher starts many times."""

import argparse
import contextlib
import time
from typing import NoReturn

import ringx


class Parser(argparse.ArgumentParser):
    """Mistakes in one line, of one rank, and exit status 2."""

    def error(self, message: str) -> NoReturn:
        with contextlib.suppress(
            ValueError
        ):  # launcher's variables that make no sense may be what the message is about
            if ringx.launch.detect(device="cpu").rank:
                time.sleep(2)  # launchers end all ranks when the first one fails: let rank 0 speak
                self.exit(2)
        self.exit(2, f"{self.prog}: error: {message}\n")
