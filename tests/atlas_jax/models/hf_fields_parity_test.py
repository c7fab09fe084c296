# SPDX-License-Identifier: Apache-2.0
"""The table of fields matches the source of the installed transformers."""

import ast
import dataclasses
import inspect
import pathlib
import textwrap

import pytest

from atlas_jax.models import hf_fields
from tests import tiny

pytest.importorskip("torch")
import transformers
from transformers import masking_utils, modeling_rope_utils
from transformers.models.auto import configuration_auto

_MODELS = pathlib.Path(transformers.__file__).parent / "models"
_CONFIGS = ("config", "self.config")


def _reads(tree):
  """Yields names that are read as attributes of a config."""
  for node in ast.walk(tree):
    match node:
      case ast.Attribute(value=owner, attr=name):
        if ast.unparse(owner) in _CONFIGS:
          yield name
      case ast.Call(
        func=ast.Name(id="getattr"), args=[owner, ast.Constant(name), *_]
      ):
        if ast.unparse(owner) in _CONFIGS:
          yield name


def _taken(function):
  """Yields names that a function takes from its keyword arguments."""
  source = textwrap.dedent(inspect.getsource(function))
  for node in ast.walk(ast.parse(source)):
    match node:
      case ast.Call(
        func=ast.Attribute(value=ast.Name(id="kwargs"), attr="get" | "pop"),
        args=[ast.Constant(name), *_],
      ):
        yield name


def _declared(kind):
  fields = {field.name for field in dataclasses.fields(kind)}
  return fields.union(kind.attribute_map, kind.attribute_map.values())


def _read_by(family):
  """Returns the fields of config.json that transformers reads for a family.

  These are the fields that its config class declares, renames or takes from
  other arguments, and those that its modeling code reads from the config.
  """
  kind = configuration_auto.CONFIG_MAPPING[family]
  module = family.removesuffix("_text")
  modeling = _MODELS / module / f"modeling_{module}.py"
  found = set()
  for path in (modeling, masking_utils.__file__, modeling_rope_utils.__file__):
    tree = ast.parse(pathlib.Path(path).read_text(encoding="utf-8"))
    found |= set(_reads(tree))
  # The module of a text-only family also holds its multimodal model.
  found -= _declared(configuration_auto.CONFIG_MAPPING[module])
  found |= _declared(kind)
  for parent in kind.__mro__:
    for name in ("__post_init__", "convert_rope_params_to_dict"):
      if name in vars(parent):
        found |= set(_taken(vars(parent)[name]))
  return {name for name in found if not callable(getattr(kind, name, None))}


def test_the_table_matches_transformers():
  expected = set.union(*map(_read_by, tiny.FAMILIES))
  assert sorted(hf_fields.READ) == sorted(expected)
