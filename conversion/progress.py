# SPDX-License-Identifier: Apache-2.0
"""Reports bytes and seconds of long work: a bar on a terminal, else lines."""

from collections.abc import Callable, Iterator
import contextlib
import sys
import time

import rich.console
import rich.progress

_MAX_SILENCE_S = 30.0


@contextlib.contextmanager
def reporting(what: str, total: int) -> Iterator[Callable[[int], None]]:
  """Reports the progress of `total` bytes on stderr.

  Yields:
    A function that adds a number of bytes to those done.
  """
  start = time.monotonic()
  show = _bar if sys.stderr.isatty() else _lines
  with show(what, total) as advance:
    yield advance
  seconds = time.monotonic() - start
  rate = total / 1e6 / max(seconds, 1e-9)
  print(
    f"{what}: {total:,} bytes in {seconds:.1f} s, {rate:,.0f} MB/s",
    file=sys.stderr,
  )


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
  with rich.progress.Progress(
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.DownloadColumn(),
    rich.progress.TransferSpeedColumn(),
    rich.progress.TimeRemainingColumn(),
    console=rich.console.Console(stderr=True),
    transient=True,
  ) as bar:
    task = bar.add_task(what, total=total)
    yield lambda num_bytes: bar.advance(task, num_bytes)


@contextlib.contextmanager
def _lines(what: str, total: int) -> Iterator[Callable[[int], None]]:
  done, last_line = 0, time.monotonic()

  def advance(num_bytes: int) -> None:
    nonlocal done, last_line
    done += num_bytes
    if time.monotonic() - last_line > _MAX_SILENCE_S:
      last_line = time.monotonic()
      print(f"{what}: {done:,} of {total:,} bytes", file=sys.stderr)

  yield advance
