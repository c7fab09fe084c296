# SPDX-License-Identifier: Apache-2.0
"""Progress of a run: a bar on a terminal, log lines otherwise."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import datetime
import sys
import time

from absl import logging
import rich.console
import rich.progress
import rich.table
import rich.text

# Prefixes and suffixes of metrics that are left out of the line.
_FILE_ONLY = (
  "seconds",
  "rewards/",
  "rollout/",
  "groups/",
  "ratio_",
  "clip_",
  "num_",
  "teaching/num_",
  "teaching/seconds",
  "teaching/LR",
  "teaching/leak_rate",
)
_BOUNDS = ("_low", "_high")  # Of confidence intervals.
_MAX_SILENCE_S = 30.0
_MAX_CELL = 300


class Console:
  """Shows progress on stderr; a closed stderr is ignored."""

  def __init__(
    self,
    *,
    step: int,
    num_steps: int,
    now: Callable[[], float] = time.monotonic,
  ) -> None:
    """Starts at `step`, with a bar if stderr is a terminal."""
    self._num_steps, self._now = num_steps, now
    self._first_step, self._start = step, now()
    self._last_line = self._start
    self._bar = _Bar(step, num_steps) if sys.stderr.isatty() else None

  def advance(self, step: int) -> None:
    """Advances to `step`; logs a line after 30 s without one."""
    if self._bar is not None:
      self._bar.advance(step)
    elif self._now() - self._last_line > _MAX_SILENCE_S:
      self._log(step, "")

  def report(self, step: int, values: Mapping[str, float]) -> None:
    """Logs a line of metrics."""
    self._log(
      step,
      " ".join(
        f"{name}={value:.4g}"
        for name, value in values.items()
        if not name.removeprefix("eval/").startswith(_FILE_ONLY)
        and not name.endswith(_BOUNDS)
      ),
    )

  def table(self, title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Prints a table on a terminal; not in a log, where it is unreadable."""
    if self._bar is not None and rows:
      self._bar.table(title, rows)

  def close(self) -> None:
    """Removes the bar."""
    if self._bar is not None:
      self._bar.close()

  def _log(self, step: int, text: str) -> None:
    self._last_line = self._now()
    logging.info(
      "step %d/%d %s%s", step, self._num_steps, text, self._eta(step)
    )

  def _eta(self, step: int) -> str:
    done = step - self._first_step
    if done < 1 or step >= self._num_steps:
      return ""
    seconds = (self._now() - self._start) / done * (self._num_steps - step)
    left = datetime.timedelta(seconds=round(seconds))
    end = datetime.datetime.now().astimezone() + left
    return f" eta={left} ({end:%H:%M})"


class _Bar:
  """A progress bar below the log lines."""

  def __init__(self, step: int, num_steps: int) -> None:
    self._console = rich.console.Console(stderr=True)
    self._progress = rich.progress.Progress(
      rich.progress.TextColumn("step"),
      rich.progress.MofNCompleteColumn(),
      rich.progress.BarColumn(),
      rich.progress.TimeElapsedColumn(),
      rich.progress.TimeRemainingColumn(),
      console=self._console,
      transient=True,
      refresh_per_second=2,
    )
    self._task = self._progress.add_task("", completed=step, total=num_steps)
    # rich replaces sys.stderr while the bar is shown, to print lines above it;
    # absl's handler holds the original stream.
    self._handler = logging.get_absl_handler().python_handler
    self._stream = self._handler.stream
    with contextlib.suppress(OSError):
      self._progress.start()
      self._handler.setStream(sys.stderr)

  def advance(self, step: int) -> None:
    self._progress.update(self._task, completed=step)

  def table(self, title: str, rows: Sequence[Mapping[str, object]]) -> None:
    table = rich.table.Table(*rows[0], title=title, show_lines=True)
    for row in rows:
      table.add_row(*(_cell(value) for value in row.values()))
    with contextlib.suppress(OSError):
      self._console.print(table)

  def close(self) -> None:
    self._handler.setStream(self._stream)
    with contextlib.suppress(OSError):
      self._progress.stop()


def _cell(value: object) -> rich.text.Text:
  """Formats a value, truncated; brackets are not parsed as markup."""
  text = f"{value:.3f}" if isinstance(value, float) else str(value)
  return rich.text.Text(text[:_MAX_CELL] + "..." * (len(text) > _MAX_CELL))
