# SPDX-License-Identifier: Apache-2.0
"""The README.md of what is written: what it is, and where it came from."""

from collections.abc import Mapping
import dataclasses
import importlib.metadata
import pathlib
import subprocess
from typing import Literal

from absl import logging
import huggingface_hub
import yaml

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_NAME = "README.md"
# What a base's card says that holds of what was made from it.
_INHERITED = ("license", "license_name", "license_link", "language")
_LIMITS = """\
## Limits

These weights were read back and compared with those that were trained; that
says nothing about what they write. They were evaluated as far as the metrics
above go. What limits the base model, and its license, limit these weights too.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
  """What the files do not tell.

  Attributes:
    base: path or id of the model that these weights were made from; empty for
      none.
    facts: such as the recipe, the reward and the data's fingerprint; one line
      each.
    metrics: the last of each, with its step.
    rounded_to: how the base was kept while adapters were trained; empty where
      it was not rounded.
  """

  base: str
  facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
  metrics: Mapping[str, tuple[int, float]] = dataclasses.field(
    default_factory=dict
  )
  rounded_to: str = ""


def write(
  directory: pathlib.Path,
  card: Card,
  *,
  source: pathlib.Path,
  library: Literal["transformers", "peft"],
  digests: Mapping[str, str],
) -> None:
  """Writes a card that the Hub can read.

  Args:
    directory: gets README.md.
    card: see there.
    source: where the base is on disk; its card's license is handed on.
    library: that opens the directory.
    digests: of the files with weights; see `shards.new_digest`.
  """
  inherited = _read_head(source)
  head = {
    "library_name": library,
    "pipeline_tag": "text-generation",
    "tags": ["atlas_jax", *(["lora"] if library == "peft" else [])],
    **{key: inherited[key] for key in _INHERITED if key in inherited},
  }
  revision = _hub_revision(source)
  # The Hub wants an id of its own, which a path is not.
  if base := card.base if revision else inherited.get("base_model"):
    head["base_model"] = base
  facts = {**card.facts, "Written by": _code()}
  if card.base:
    facts = {"Base model": card.base, **facts}
  if revision:
    facts["Base revision"] = revision
  if card.rounded_to:
    facts["Base rounded to"] = (
      f"{card.rounded_to}: adapters were trained over the rounded base"
    )
    facts["Weights"] = (
      "adapters, for the base as it is or rounded alike"
      if library == "peft"
      else "the rounded base's, with adapters added; not the base's own"
    )
  if card.base and "license" not in head:
    facts["License"] = "that of the base model, whose card names none here"
  text = "\n".join(
    [
      "---",
      huggingface_hub.ModelCardData(**head).to_yaml(),
      "---",
      "",
      "# Model card",
      "",
      *(f"- {name}: {_one_line(fact)}" for name, fact in facts.items()),
      "",
      *_table(
        "Metrics",
        ("metric", "step", "value"),
        [(n, str(s), f"{v:.6g}") for n, (s, v) in card.metrics.items()],
      ),
      *_table("Files", ("file", "XXH3, by xxhsum -H2"), list(digests.items())),
      _LIMITS,
    ]
  )
  (directory / _NAME).write_text(text, encoding="utf-8")


def _read_head(source: pathlib.Path) -> dict[str, object]:
  """Reads what stands at the head of the base's card, if it has one."""
  path = source / _NAME
  if not path.exists():
    return {}
  try:
    return huggingface_hub.metadata_load(path) or {}
  except (OSError, ValueError, yaml.YAMLError) as error:
    # No reason to lose what was trained.
    logging.warning("The card of the base is not read: %s", error)
    return {}


def _code() -> str:
  """Names this project's version and, in a clone, its commit."""
  try:
    version = importlib.metadata.version("atlas_jax")
  except importlib.metadata.PackageNotFoundError:
    version = "not installed"
  command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"]
  try:
    found = subprocess.run(
      command, capture_output=True, text=True, timeout=10, check=False
    )
  except (OSError, subprocess.TimeoutExpired):
    return f"atlas_jax {version}"
  return f"atlas_jax {version} {found.stdout.strip()}".strip()


def _hub_revision(source: pathlib.Path) -> str | None:
  """Gives the commit of a directory that came from the Hub."""
  return source.name if source.parent.name == "snapshots" else None


def _table(
  title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]
) -> list[str]:
  if not rows:
    return []
  lines = [head, ("---",) * len(head), *rows]
  return [
    *(f"## {title}", ""),
    *(f"| {' | '.join(map(_one_line, line))} |" for line in lines),
    "",
  ]


def _one_line(text: str) -> str:
  """Keeps a text from ending its line or cell, and from being read as HTML."""
  return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
