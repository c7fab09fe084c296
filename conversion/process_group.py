# SPDX-License-Identifier: Apache-2.0
"""Writes one directory from several processes, on a disk that all of them see.

Each process writes some of the files. An error in one is raised in all, so
that no process waits for it and the directory never gets its final name.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import json
import pathlib
from typing import Any

from atlas_jax import errors


@dataclasses.dataclass(frozen=True)
class ProcessShare:
  """This process's place among those that write a directory.

  Attributes:
    index: process 0 also does the work that is done once.
    count: number of processes.
    exchange: all-gathers a text, in process order. It blocks until all
      processes have called it, or a timeout expires. It may pad the texts with
      trailing spaces.
  """

  index: int
  count: int
  exchange: Callable[[str], Sequence[str]]

  def together(self, act: Callable[[], str]) -> list[str]:
    """Calls `act` in every process and returns all results, in process order.

    Raises:
      errors.AtlasError: if `act` failed in any process; its own error in that
        process, a `CheckpointError` that quotes it in the others.
    """
    try:
      reply = {"got": act()}
    except errors.AtlasError as error:
      self.exchange(json.dumps({"failed": f"{error.what} {error.why}"}))
      raise
    replies = [json.loads(text) for text in self.exchange(json.dumps(reply))]
    for index, each in enumerate(replies):
      if "failed" in each:
        raise errors.CheckpointError(
          "Another process failed to write its files.",
          where=f"process {index} of {self.count}",
          why=each["failed"],
          fix="See the error of that process; the directory was not renamed.",
        )
    return [each["got"] for each in replies]


ALONE = ProcessShare(0, 1, lambda text: [text])


def write_directory(
  share: ProcessShare,
  opened: contextlib.AbstractContextManager[pathlib.Path],
  write_part: Callable[[pathlib.Path], Mapping[str, Any]],  # Any: JSON.
  finish: Callable[[pathlib.Path, dict[str, Any]], Any],  # Any: JSON.
) -> Any:  # Any: JSON.
  """Writes a directory from several processes, completely or not at all.

      process 0             process 1
      enter `opened`                        creates a private directory
      ------------- exchange of its path ----
      `write_part`          `write_part`    each writes its own files
      ------------- exchange of results -----
      `finish`                              writes index, card or manifest
      exit `opened`                         renames the directory
      ------------- exchange of the result --

  Args:
    share: this process's share; all processes call this function.
    opened: entered by process 0 only. It yields the private directory; it
      renames the directory on a clean exit and removes it after an error.
    write_part: writes this process's files; returns a JSON value by file name.
    finish: receives the values of all processes; returns a JSON value.

  Returns:
    The value of `finish`, in every process.

  Raises:
    errors.AtlasError: in all processes if one fails; see
      `ProcessShare.together`.
  """
  is_first = share.index == 0
  with contextlib.ExitStack() as held:

    def begin() -> str:
      return str(held.enter_context(opened)) if is_first else ""

    def end() -> str:
      result = finish(partial, files) if is_first else None
      held.close()  # Renames here, so that all processes see its errors.
      return json.dumps(result)

    partial = pathlib.Path(share.together(begin)[0])
    parts = share.together(lambda: json.dumps(write_part(partial)))
    files = {
      name: value for part in parts for name, value in json.loads(part).items()
    }
    return json.loads(share.together(end)[0])


def divide(sizes: Mapping[str, int], count: int) -> list[list[str]]:
  """Distributes files, in order, so that all parts have similar sizes."""
  parts: list[list[str]] = [[] for _ in range(count)]
  held = [0] * count
  for name, size in sizes.items():
    least = held.index(min(held))
    parts[least].append(name)
    held[least] += size
  return parts
