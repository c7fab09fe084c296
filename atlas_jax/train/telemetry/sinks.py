# SPDX-License-Identifier: Apache-2.0
"""TensorBoard, W&B and trackio, which can neither block nor fail a run.

Each tracker has its own thread and a bounded queue. Metrics that it rejects or
consumes too slowly are dropped, with one warning; `metrics.jsonl` is complete.
"""

from collections.abc import Callable, Mapping, Sequence
import importlib
import importlib.util
import json
import os
import pathlib
import queue
import secrets
import textwrap
import threading
import time
from typing import Any, Protocol

from absl import logging

from atlas_jax import errors

# A table row: column names to JSON values.
Row = Mapping[str, Any]  # Any: text, numbers or None.

NONE = "none"
_PACKAGES = {
  "tensorboard": "tensorboardX",
  "wandb": "wandb",
  "trackio": "trackio",
}
_ADVICE = {"wandb": "set WANDB_API_KEY, or WANDB_MODE=offline"}
_MAX_WAITING = 256
_MAX_CLOSE_S = 20.0


class Sink(Protocol):
  """A backend for the metrics of a run; may raise, and may block."""

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes finite metrics after `step` steps."""
    ...

  def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
    """Writes a table of at least one row; all rows have the same columns."""
    ...

  def close(self) -> None:
    """Flushes and closes the backend."""
    ...


def open_sinks(
  workdir: pathlib.Path,
  resolved: Mapping[str, Any],  # Any: a config's values, as JSON.
  *,
  to: str,
  project: str,
  group: str,
  name: str,
) -> list["Background"]:
  """Returns the trackers of a run, not started yet.

  Args:
    workdir: TensorBoard writes to `tensorboard/` in it. Its name is the run's
      name if `name` is empty.
    resolved: the run's config, which every tracker stores.
    to: "none", or comma-separated tracker names.
    project: project of the run in W&B and trackio.
    group: group of the run within the project; may be empty.
    name: name of the run.

  Raises:
    errors.ConfigError: for an unknown tracker, or one that is not installed.
  """
  chosen = [part.strip() for part in to.split(",") if part.strip() != NONE]
  for tracker in chosen:
    _check(tracker, to)
  tracked = {
    "project": project,
    "group": group or None,
    "name": name or workdir.resolve().name,
    "config": dict(resolved),
  }
  openers: dict[str, Callable[[], Sink]] = {
    "tensorboard": lambda: _TensorBoard(workdir / "tensorboard", resolved),
    "wandb": lambda: _WandB(workdir, tracked),
    "trackio": lambda: _Trackio(tracked),
  }
  return [Background(tracker, openers[tracker]) for tracker in chosen]


def _check(tracker: str, to: str) -> None:
  """Checks that a tracker is known and installed."""
  if tracker not in _PACKAGES:
    raise errors.ConfigError(
      f"Unknown tracker {tracker!r}.",
      where=f"--config.report.to={to}",
      why=f"Supported trackers: {', '.join(_PACKAGES)}; or {NONE}.",
      fix="Set one or more of them, separated by commas.",
    )
  package = _PACKAGES[tracker]
  if importlib.util.find_spec(package) is None:
    raise errors.ConfigError(
      f"Tracker {tracker!r} is not installed.",
      where=f"--config.report.to={to}",
      why=f"Module {package} was not found.",
      fix=f"pip install {package}, or remove {tracker} from report.to.",
    )


class Background:
  """Feeds a sink from its own thread, so that it cannot block or fail a run."""

  def __init__(self, name: str, open_sink: Callable[[], Sink]) -> None:
    """Creates the thread; `start` opens the sink."""
    self._name, self._open_sink = name, open_sink
    self._jobs: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(
      _MAX_WAITING
    )
    self._has_warned = False
    self._thread = threading.Thread(
      target=self._run, name=f"sink-{name}", daemon=True
    )

  def start(self) -> None:
    """Starts the thread, which opens the sink: that too may fail or block."""
    self._thread.start()

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Enqueues metrics; does not block."""
    self._enqueue(lambda sink: sink.scalars(step, values))

  def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
    """Enqueues a table; does not block."""
    self._enqueue(lambda sink: sink.table(step, name, rows))

  def close(self, max_wait_s: float = _MAX_CLOSE_S) -> None:
    """Waits up to `max_wait_s` for the sink to finish."""
    deadline = time.monotonic() + max_wait_s
    try:
      self._jobs.put(None, timeout=max_wait_s)
    except queue.Full:
      self._warn("its queue is full")
      return
    self._thread.join(max(0.0, deadline - time.monotonic()))
    if self._thread.is_alive():
      self._warn(f"it did not finish within {max_wait_s:.0f} s")

  def _enqueue(self, job: Callable[[Sink], None]) -> None:
    try:
      self._jobs.put_nowait(job)
    except queue.Full:
      self._warn("it is slower than the run")

  def _run(self) -> None:
    sink: Sink | None = None
    with _Suppress(self._warn_not_opened):
      sink = self._open_sink()
    while (job := self._jobs.get()) is not None:
      if sink is not None:
        with _Suppress(self._warn):
          job(sink)
    if sink is not None:
      with _Suppress(self._warn):
        sink.close()

  def _warn_not_opened(self, why: str) -> None:
    advice = _ADVICE.get(self._name)
    self._warn(f"{why} while opening{f' ({advice})' if advice else ''}")

  def _warn(self, why: str) -> None:
    if not self._has_warned:
      self._has_warned = True
      logging.warning(
        "Dropping metrics of tracker %s: %s. metrics.jsonl has all metrics.",
        self._name,
        why,
      )


class _Suppress:
  """Suppresses and reports any exception of a block.

  The block runs a tracker's code, which may raise anything.
  """

  def __init__(self, report: Callable[[str], None]) -> None:
    self._report = report

  def __enter__(self) -> None:
    pass

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: object,
  ) -> bool:
    del trace
    if kind is not None:
      # A library's message may contain a key, or a URL with one; the system's
      # text of an errno does not.
      number = error.errno if isinstance(error, OSError) else None
      why = f" (errno {number}, {os.strerror(number)})" if number else ""
      self._report(f"it raised {kind.__name__}{why}")
    return True


class _TensorBoard:
  """Event files written by tensorboardX, which needs no TensorFlow or torch."""

  def __init__(
    self,
    directory: pathlib.Path,
    resolved: Mapping[str, Any],  # Any: as in `open_sinks`.
  ) -> None:
    writer = importlib.import_module("tensorboardX").SummaryWriter
    self._writer = writer(str(directory), flush_secs=10)
    # Four spaces are a code block in Markdown.
    config = json.dumps(resolved, indent=2)
    self._writer.add_text("config", textwrap.indent(config, " " * 4), 0)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
    self._writer.add_text(name, markdown(rows), step)

  def close(self) -> None:
    self._writer.close()


class _WandB:
  """A Weights & Biases run, resumed when the workdir is resumed."""

  def __init__(
    self,
    workdir: pathlib.Path,
    tracked: Mapping[str, Any],  # Any: as in `open_sinks`.
  ) -> None:
    self._wandb = importlib.import_module("wandb")
    path = workdir / "wandb_id"
    if not path.exists():
      path.write_text(secrets.token_hex(8), encoding="utf-8")
    self._run = self._wandb.init(
      **tracked, dir=workdir, id=path.read_text("utf-8"), resume="allow"
    )
    # W&B's own step cannot decrease; ours does when a run resumes from an
    # earlier checkpoint.
    self._run.define_metric("*", step_metric="step")

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log({"step": step, **values})

  def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
    columns = list(rows[0])
    data = [[row[column] for column in columns] for row in rows]
    table = self._wandb.Table(columns=columns, data=data)
    self._run.log({"step": step, name: table})

  def close(self) -> None:
    self._run.finish()


class _Trackio:
  """A trackio run, stored on this machine."""

  def __init__(self, tracked: Mapping[str, Any]) -> None:  # Any: as above.
    module = importlib.import_module("trackio")
    self._text = module.Markdown
    self._run = module.init(**tracked, resume="allow", embed=False)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log(dict(values), step=step)

  def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
    self._run.log({name: self._text(markdown(rows))}, step=step)

  def close(self) -> None:
    self._run.finish()


def markdown(rows: Sequence[Row]) -> str:
  """Formats rows as a Markdown table."""
  lines = [list(rows[0]), ["---"] * len(rows[0])]
  lines += [[_cell(value) for value in row.values()] for row in rows]
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Any) -> str:  # Any: as in `Row`.
  text = f"{value:.4g}" if isinstance(value, float) else str(value)
  return text.replace("|", "\\|").replace("\n", "<br>")
