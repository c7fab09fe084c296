# SPDX-License-Identifier: Apache-2.0
"""Several processes that write one directory on a disk they all see.

Each writes some of the files. What goes wrong in one is told to all, so that
none waits for it, and nothing gets the final name.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json

from atlas_jax import errors


@dataclasses.dataclass(frozen=True)
class ProcessShare:
  """Which of several processes this is.

  Attributes:
    index: 0 is the first, which does what is to be done once.
    count: how many there are.
    exchange: gives a text to all processes, and gets theirs, in order. It
      waits for all, and not for ever.
  """

  index: int
  count: int
  exchange: Callable[[str], Sequence[str]]

  def together(self, act: Callable[[], str]) -> list[str]:
    """Does something in every process, and gives what each of them got.

    Raises:
      errors.AtlasError: if it failed in any; its own error, where it did here.
    """
    try:
      told = {"got": act()}
    except errors.AtlasError as error:
      self.exchange(json.dumps({"failed": f"{error.what} {error.why}"}))
      raise
    everyone = [json.loads(text) for text in self.exchange(json.dumps(told))]
    for index, each in enumerate(everyone):
      if "failed" in each:
        raise errors.CheckpointError(
          "Another process could not write its part.",
          where=f"process {index} of {self.count}",
          why=each["failed"],
          fix="See that process's error; nothing got the final name.",
        )
    return [each["got"] for each in everyone]


ALONE = ProcessShare(0, 1, lambda text: [text])


def divide(sizes: Mapping[str, int], count: int) -> list[list[str]]:
  """Deals files out, in order, so that all get about as many bytes."""
  parts: list[list[str]] = [[] for _ in range(count)]
  held = [0] * count
  for name, size in sizes.items():
    least = held.index(min(held))
    parts[least].append(name)
    held[least] += size
  return parts
