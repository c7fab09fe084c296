"""Holds the source tree to the layers drawn in STYLE.md."""

import ast
import pathlib

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_OURS = ("atlas_jax", "conversion", "rollout", "configs", "scripts")

_BASE = {"atlas_jax.types", "atlas_jax.chat", "atlas_jax.errors"}
_SIBLINGS = (
  *("models", "sharding", "checkpoint", "losses"),
  *("data", "traces", "rewards", "teaching"),
)
_JUDGED = _BASE | {"atlas_jax.teaching", "atlas_jax.rewards"}
_WEIGHTS = _BASE | {"atlas_jax.models", "atlas_jax.sharding"}

# What each part of the tree may import from the rest of it. The parts left
# out, scripts/ and atlas_jax/launch.py, wire everything together.
_MAY_IMPORT = {
  "atlas_jax.types": set(),
  "atlas_jax.errors": set(),
  "atlas_jax.chat": {"atlas_jax.types", "atlas_jax.errors"},
  **{f"atlas_jax.{sibling}": _BASE for sibling in _SIBLINGS},
  "atlas_jax.evaluation": _JUDGED,
  "atlas_jax.prompt_search": _JUDGED | {"atlas_jax.evaluation"},
  "atlas_jax.train": _JUDGED
  | {f"atlas_jax.{sibling}" for sibling in _SIBLINGS}
  | {"atlas_jax.evaluation"},
  "atlas_jax.agents": _JUDGED,
  "conversion": _WEIGHTS,
  "rollout": _WEIGHTS | {"conversion"},
  "configs": set(),
}
_ONLY_IN = {
  "torch": ("rollout/engine_vllm.py",),
  "vllm": ("rollout/engine_vllm.py",),
  "absl.flags": ("scripts/",),
  "ml_collections": ("configs/", "scripts/", "atlas_jax/train/"),
}


def _imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _within(name, prefix):
  return name == prefix or name.startswith(prefix + ".")


_SOURCES = [
  path.relative_to(_ROOT)
  for package in _OURS
  for path in sorted((_ROOT / package).rglob("*.py"))
]


@pytest.mark.parametrize("path", _SOURCES, ids=str)
def test_imports_only_what_its_layer_may(path):
  module = ".".join(path.with_suffix("").parts)
  for layer, others in _MAY_IMPORT.items():
    if _within(module, layer):
      for name in _imports(_ROOT / path):
        if any(_within(name, package) for package in _OURS):
          assert any(_within(name, other) for other in others | {layer}), (
            f"{module} may not import {name}"
          )


@pytest.mark.parametrize("path", _SOURCES, ids=str)
def test_heavy_imports_stay_in_their_room(path):
  for name in _imports(_ROOT / path):
    for heavy, rooms in _ONLY_IN.items():
      if _within(name, heavy):
        assert path.as_posix().startswith(rooms), f"{path} imports {name}"
