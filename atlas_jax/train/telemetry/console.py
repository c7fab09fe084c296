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
  "rollout/",
  "groups/",
  "ratio_",
  "clip_",
  "num_",
  "device_",
  "goodput",
  "init_s",
  "padding_fraction",
  "updated_fraction",
  "memory/device_gb",
  "memory/host",
  "teaching/num_",
  "teaching/seconds",
  "teaching/completion_rate",
  "teaching/LR",
)
_BOUNDS = ("_low", "_high")  # Of confidence intervals.
# Prefixes of metrics that are left out while they are 0.
_NONZERO = (
  "rewards/",
  "teaching/leak_rate",
  "teaching/no_teaching_rate",
  "truncated_fraction",
  "dropped_fraction",
  "grading_failures",
)
_FIRST = ("loss", "reward")
# Phases that the first step names, since they also compile their programs.
_PHASES = {
  "dry_pass": "dry pass of one question",
  "data": "loading data",
  "baseline": "sampling baselines",
  "probe": "sampling probes",
  "teach": "sampling teachings",
  "solve": "sampling answers",
  "rollout": "sampling on rollout servers",
  "sample": "sampling completions",
  "reward": "computing rewards",
  "train": "compiling and running the update",
}
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
    self._once_s = 0.0
    self._phase: str | None = ""  # None after the first step.
    self._last_line = self._start
    self._bar = _Bar(step, num_steps) if sys.stderr.isatty() else None

  def phase(self, name: str) -> None:
    """Logs the start of a phase of the first step, once."""
    text = _PHASES.get(name)
    if self._phase is not None and text and name != self._phase:
      self._phase, self._last_line = name, self._now()
      logging.info("Step %d: %s ...", self._first_step + 1, text)

  def advance(self, step: int, *, once_s: float) -> None:
    """Advances to `step`; logs a line after 30 s without one.

    Args:
      step: number of completed steps.
      once_s: seconds so far that later steps do not spend, such as compilation;
        left out of the expected end.
    """
    self._phase, self._once_s = None, once_s
    if self._bar is not None:
      self._bar.advance(step, self._eta(step))
    elif self._now() - self._last_line > _MAX_SILENCE_S:
      self._log(step, "")

  def report(self, step: int, values: Mapping[str, float]) -> None:
    """Logs a line of metrics, the loss and rewards first."""
    self._log(
      step,
      " ".join(
        f"{name}={value:.4g}"
        for name, value in sorted(
          values.items(), key=lambda item: not item[0].startswith(_FIRST)
        )
        if _is_shown(name.removeprefix("eval/"), value)
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
    parts = (f"step {step}/{self._num_steps}", text, self._eta(step))
    logging.info("%s", " ".join(filter(None, parts)))

  def _eta(self, step: int) -> str:
    done = step - self._first_step
    if done < 1 or step >= self._num_steps:
      return ""
    spent = self._now() - self._start - self._once_s
    seconds = max(spent, 0.0) / done * (self._num_steps - step)
    left = datetime.timedelta(seconds=round(seconds))
    end = datetime.datetime.now().astimezone() + left
    return f"eta={left} ({end:%H:%M})"


class _Bar:
  """A progress bar below the log lines."""

  def __init__(self, step: int, num_steps: int) -> None:
    self._console = rich.console.Console(stderr=True)
    self._progress = rich.progress.Progress(
      rich.progress.TextColumn("step"),
      rich.progress.MofNCompleteColumn(),
      rich.progress.BarColumn(),
      rich.progress.TimeElapsedColumn(),
      rich.progress.TextColumn("{task.fields[eta]}"),
      console=self._console,
      transient=True,
      refresh_per_second=2,
    )
    self._task = self._progress.add_task(
      "", completed=step, total=num_steps, eta=""
    )
    # rich replaces sys.stderr while the bar is shown, to print lines above it;
    # absl's handler holds the original stream.
    self._handler = logging.get_absl_handler().python_handler
    self._stream = self._handler.stream
    with contextlib.suppress(OSError):
      self._progress.start()
      self._handler.setStream(sys.stderr)

  def advance(self, step: int, eta: str) -> None:
    self._progress.update(self._task, completed=step, eta=eta)

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


def _is_shown(name: str, value: float) -> bool:
  """Returns whether a metric is part of the line."""
  if name.startswith(_FILE_ONLY) or name.endswith(_BOUNDS):
    return False
  return bool(value) or not name.startswith(_NONZERO)


def _cell(value: object) -> rich.text.Text:
  """Formats a value, truncated; brackets are not parsed as markup."""
  text = f"{value:.3f}" if isinstance(value, float) else str(value)
  return rich.text.Text(text[:_MAX_CELL] + "..." * (len(text) > _MAX_CELL))
