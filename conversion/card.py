# SPDX-License-Identifier: Apache-2.0
"""Writes the model card (README.md) of an export."""

from collections.abc import Mapping
import contextlib
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
# Fields of the base's card that also apply to models derived from it.
_INHERITED = ("license", "license_name", "license_link", "language")
_LIMITS = """\
## Limits

The files were read back and compared with the trained weights. The quality of
the generated text was evaluated only by the metrics above. The limitations and
the license of the base model also apply to these weights.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
  """Contents of a model card that are not in the model's files.

  Attributes:
    base: path or Hub id of the base model; may be empty.
    facts: values by label, such as the recipe, the reward and the data's
      fingerprint; one line each.
    metrics: the last value of each metric, with its step.
    rounded_to: precision of the quantized base under the adapters; empty if
      the base was not quantized.
    warning: what a user must know before using the weights; may be empty.
  """

  base: str
  facts: Mapping[str, str] = dataclasses.field(default_factory=dict)
  metrics: Mapping[str, tuple[int, float]] = dataclasses.field(
    default_factory=dict
  )
  rounded_to: str = ""
  warning: str = ""


def write(
  directory: pathlib.Path,
  card: Card,
  *,
  source: pathlib.Path,
  library: Literal["transformers", "peft"],
  digests: Mapping[str, str],
) -> None:
  """Writes a model card in the Hub's format.

  Args:
    directory: receives README.md.
    card: contents; see `Card`.
    source: directory of the base model; the license of its card is copied.
    library: the library that loads the directory.
    digests: digest of each weight file; see `shards.new_digest`.
  """
  inherited, revision = _read_head(source), _hub_revision(source)
  head = {
    "library_name": library,
    "pipeline_tag": "text-generation",
    "tags": ["atlas_jax", *(["lora"] if library == "peft" else [])],
    **{key: inherited[key] for key in _INHERITED if key in inherited},
  }
  # The Hub accepts only its own ids here, not local paths.
  if base := card.base if revision else inherited.get("base_model"):
    head["base_model"] = base
  facts = _facts(card, revision, library)
  if card.base and "license" not in head:
    facts["License"] = "that of the base model; its card here names no license"
  text = "\n".join(
    [
      "---",
      huggingface_hub.ModelCardData(**head).to_yaml(),
      "---",
      "",
      "# Model card",
      "",
      *([f"> **Warning:** {_one_line(card.warning)}", ""] * bool(card.warning)),
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


def _facts(
  card: Card, revision: str | None, library: Literal["transformers", "peft"]
) -> dict[str, str]:
  """Returns the lines of the card that say how the weights were made."""
  facts = {**card.facts, "Written by": _code()}
  if card.base:
    facts = {"Base model": card.base, **facts}
  if revision:
    facts["Base revision"] = revision
  if card.rounded_to:
    facts["Base quantized to"] = (
      f"{card.rounded_to}: adapters were trained over the quantized base"
    )
    facts["Weights"] = (
      "adapters, for the original base or one quantized in the same way"
      if library == "peft"
      else "the quantized base merged with adapters, not the original base"
    )
  return facts


def _read_head(source: pathlib.Path) -> dict[str, object]:
  """Reads the YAML header of the base's card, if it has one."""
  path = source / _NAME
  if not path.exists():
    return {}
  try:
    return huggingface_hub.metadata_load(path) or {}
  except (OSError, ValueError, yaml.YAMLError) as error:
    # The export is more important than the fields copied from this card.
    logging.warning("Ignored the unreadable card of the base: %s", error)
    return {}


def _code() -> str:
  """Returns the installed version, if any, and in a git clone its commit."""
  name = "atlas_jax"
  with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    name += f" {importlib.metadata.version('atlas_jax')}"
  command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"]
  try:
    found = subprocess.run(
      command, capture_output=True, text=True, timeout=10, check=False
    )
  except (OSError, subprocess.TimeoutExpired):
    return name
  return f"{name} {found.stdout.strip()}".strip()


def _hub_revision(source: pathlib.Path) -> str | None:
  """Returns the commit of a directory in the Hub's cache, or None."""
  return source.name if source.parent.name == "snapshots" else None


def _table(
  title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]
) -> list[str]:
  if not rows:
    return []
  lines = [head, ("---",) * len(head), *rows]
  return [
    f"## {title}",
    "",
    *(f"| {' | '.join(map(_one_line, line))} |" for line in lines),
    "",
  ]


def _one_line(text: str) -> str:
  """Joins a text into one line and escapes Markdown cells and HTML."""
  return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
