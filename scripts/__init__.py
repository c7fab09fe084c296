# SPDX-License-Identifier: Apache-2.0
"""Command-line entry points."""

import os
import signal
import sys
from typing import NoReturn

# Only its tokenizers are used; it need not advise to install PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def exit_on_interrupt(number: int, frame: object) -> NoReturn:
  """Handles SIGINT while a script's modules are imported."""
  del number, frame
  os.write(2, b"\nInterrupted before the start.\n")
  os._exit(130)  # As shells report a process that SIGINT ended.


# Python runs this before a script imports anything: for `python -m scripts.X`
# with an argv of `-m`, for an installed command with its path. `program.leave`
# sets the default handler again.
if (
  os.path.basename(sys.argv[0]).startswith(("-m", "atlas-"))
  and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
  signal.signal(signal.SIGINT, exit_on_interrupt)
