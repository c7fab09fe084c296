# SPDX-License-Identifier: Apache-2.0
"""Reads the meaning of config keys from the comments of the config files.

  config.loop = dict(  # train.loop.Settings
    num_steps=0,  # Steps to train.
    # Newest checkpoints to keep: a comment above works too.
    keep=3,
  )

A key's meaning is the comment next to its value. A dotted name after `dict(` is
what reads the section. Later assignments change the value, not the meaning.
"""

import ast
from collections.abc import Iterator
import dataclasses
import functools
import importlib.util
import io
import pathlib
import re
import tokenize
from typing import Any, NamedTuple

import ml_collections

from atlas_jax import types

_READER = re.compile(r"[a-z]\w*(\.\w+)+")
_SECTIONS = ("dict", "ml_collections.ConfigDict")


class Key(NamedTuple):
  """A key of a config.

  Attributes:
    meaning: its comment, or "".
    reader: dotted name of what reads its section, or "".
    file: the file that sets its value last, variants left out.
  """

  meaning: str
  reader: str
  file: pathlib.Path


def read(recipe: pathlib.Path) -> dict[str, Key]:
  """Returns the keys that a recipe's `get_config` sets, by dotted name.

  It follows calls within the recipe and into imported config files, but not
  the branches of `if`, such as those of variants.
  """
  keys: dict[str, Key] = {}
  for name, key in _of_function(_Source(recipe), "get_config", ""):
    if name in keys:
      key = keys[name]._replace(file=key.file)
    keys[name] = key
  return keys


def values(
  section: types.Config, prefix: str = ""
) -> Iterator[tuple[str, Any]]:  # Any: values of a config.
  """Yields the dotted name and the value of every key."""
  for key, value in section.items():
    if isinstance(value, ml_collections.ConfigDict):
      yield from values(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}", value


class _Source:
  """A parsed config file: its functions, imports and comments."""

  def __init__(self, path: pathlib.Path) -> None:
    self.path = path
    text = path.read_text(encoding="utf-8")
    self._tree = ast.parse(text)
    self._comments: dict[int, str] = {}
    self._alone: set[int] = set()  # Lines that are only a comment.
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
      if token.type == tokenize.COMMENT:
        row, column = token.start
        self._comments[row] = token.string.lstrip("# ")
        if not token.line[:column].strip():
          self._alone.add(row)

  def comment(self, first: int, last: int) -> str:
    """Returns the comment after line `last`, or those above line `first`."""
    if last in self._comments and last not in self._alone:
      return self._comments[last]
    above = []
    while (first := first - 1) in self._alone:
      above.insert(0, self._comments[first])
    return " ".join(above)

  def function(self, name: str) -> ast.FunctionDef | None:
    """Returns a function of the module."""
    for node in self._tree.body:
      if isinstance(node, ast.FunctionDef) and node.name == name:
        return node
    return None

  def module(self, node: ast.expr) -> "_Source | None":
    """Returns the imported module that an expression names.

    Of a table of modules that is indexed, the first one.
    """
    name = ast.unparse(node)
    if isinstance(node, ast.Subscript):
      table = ast.unparse(node.value)
      for statement in self._tree.body:
        match statement:
          case ast.Assign(targets=[target], value=ast.Call() as modules) if (
            ast.unparse(target) == table
          ):
            name = ast.unparse(modules.keywords[0].value)
    for statement in self._tree.body:
      if isinstance(statement, ast.ImportFrom):
        for alias in statement.names:
          if (alias.asname or alias.name) == name:
            return _open(f"{statement.module}.{alias.name}")
    return None


@functools.cache
def _open(module: str) -> _Source | None:
  try:
    spec = importlib.util.find_spec(module)
  except ModuleNotFoundError:  # A name in a module.
    return None
  if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
    return None
  return _Source(pathlib.Path(spec.origin))


@dataclasses.dataclass(frozen=True)
class _Place:
  """Where an expression is assigned: a dotted name, at lines of a file."""

  source: _Source
  name: str
  first: int
  last: int
  reader: str = ""

  def below(self, key: str, node: ast.keyword | ast.expr) -> "_Place":
    """Returns the place of a key of this section."""
    return dataclasses.replace(
      self,
      name=f"{self.name}.{key}".strip("."),
      first=node.lineno,
      last=node.end_lineno or node.lineno,
    )


def _of_function(
  source: _Source, name: str, prefix: str
) -> Iterator[tuple[str, Key]]:
  """Yields the keys that a function's config gets, in order."""
  function = source.function(name)
  for statement in function.body if function else ():
    place = _Place(
      source, prefix, statement.lineno, statement.end_lineno or statement.lineno
    )
    match statement:
      case ast.Assign(targets=[target], value=value):
        dotted = ast.unparse(target)
        if dotted.partition(".")[0] == "config":
          name = f"{prefix}{dotted.removeprefix('config')}".strip(".")
          yield from _of_value(dataclasses.replace(place, name=name), value)
      case ast.Return(value=ast.Call() as value):
        yield from _of_value(place, value)
      case ast.Expr(
        value=ast.Call(func=ast.Attribute(value=owner, attr="update")) as call
      ):
        name = f"{prefix}{ast.unparse(owner).removeprefix('config')}".strip(".")
        yield from _of_section(dataclasses.replace(place, name=name), call)


def _of_value(place: _Place, value: ast.expr) -> Iterator[tuple[str, Key]]:
  """Yields the keys of an assigned expression, or its own if it has none."""
  if isinstance(value, ast.Call) and ast.unparse(value.func) in _SECTIONS:
    yield from _of_section(place, value)
    return
  inner = list(_of_call(place, value))
  yield from inner
  if not inner and place.name:
    comment = place.source.comment(place.first, place.last)
    yield place.name, Key(comment, place.reader, place.source.path)


def _of_section(place: _Place, call: ast.Call) -> Iterator[tuple[str, Key]]:
  """Yields the keys of `dict(...)`, `ConfigDict(...)` or `.update(...)`."""
  comment = place.source.comment(0, call.lineno)
  if _READER.fullmatch(comment):
    place = dataclasses.replace(place, reader=comment)
  for argument in call.args:
    yield from _of_value(place, argument)
  for keyword in call.keywords:
    if keyword.arg is not None:
      yield from _of_value(place.below(keyword.arg, keyword), keyword.value)
  if not call.args and not call.keywords:
    comment = place.source.comment(place.first, place.last)
    yield place.name, Key(comment, place.reader, place.source.path)


def _of_call(place: _Place, value: ast.expr) -> Iterator[tuple[str, Key]]:
  """Yields the keys of a call of a config function, or of its attribute."""
  match value:
    case ast.Call(func=ast.Name(id=name)):
      yield from _of_function(place.source, name, place.name)
    case ast.Call(func=ast.Attribute(value=owner, attr=name)):
      if module := place.source.module(owner):
        yield from _of_function(module, name, place.name)
    case ast.Attribute(value=ast.Call() as call, attr=attribute):
      for name, key in _of_call(dataclasses.replace(place, name=""), call):
        first, _, rest = name.partition(".")
        if first == attribute and rest:
          yield f"{place.name}.{rest}", key
