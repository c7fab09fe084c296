# SPDX-License-Identifier: Apache-2.0
"""Checks imports against the layers in STYLE.md, and code for unsafe calls."""

import ast
import graphlib
import pathlib

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_OURS = ("atlas_jax", "conversion", "rollout", "configs", "scripts")

_ERRORS = {"atlas_jax.errors"}
_BASE = _ERRORS | {"atlas_jax.types", "atlas_jax.chat"}
_SIBLINGS = (
  "models",
  "sharding",
  "checkpoint",
  "losses",
  "data",
  "traces",
  "rewards",
  "teaching",
)
_JUDGED = _BASE | {"atlas_jax.teaching", "atlas_jax.rewards"}
_EVALUATION = {"atlas_jax.evaluation"}
_WEIGHTS = _BASE | {
  "atlas_jax.models",
  "atlas_jax.sharding",
  "atlas_jax.checkpoint_format",
}
_LIBRARIES = {"atlas_jax", "conversion", "rollout", "configs"}

# The layers that each layer may import. Some do not exist yet.
_MAY_IMPORT = {
  "atlas_jax.types": set(),
  "atlas_jax.errors": set(),
  "atlas_jax.chat": {"atlas_jax.types", "atlas_jax.errors"},
  "atlas_jax.checkpoint_format": _ERRORS,
  "atlas_jax.distributed": _ERRORS,
  "atlas_jax.doctor": _ERRORS,
  **{f"atlas_jax.{sibling}": _BASE for sibling in _SIBLINGS},
  "atlas_jax.checkpoint": _BASE | {"atlas_jax.checkpoint_format"},
  "atlas_jax.evaluation": _JUDGED,
  "atlas_jax.agents": _JUDGED,
  "atlas_jax.prompt_search": _JUDGED | _EVALUATION,
  "atlas_jax.runtime": _JUDGED | {"atlas_jax.traces", "atlas_jax.agents"},
  "atlas_jax.train": _JUDGED
  | {f"atlas_jax.{sibling}" for sibling in _SIBLINGS}
  | _EVALUATION,
  "conversion": _WEIGHTS,
  "rollout": _WEIGHTS | {"conversion"},
  "configs": set(),
  "scripts.job": _LIBRARIES
  | {
    "scripts.dtypes",
    "scripts.launch_overrides",
    "scripts.override_names",
    "scripts.small_world",
  },
  "scripts": _LIBRARIES,
}
_ONLY_IN = {
  "torch": ("rollout/server/engine_vllm.py", "scripts/bench/train_torch.py"),
  "vllm": ("rollout/server/engine_vllm.py",),
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


def _module(path):
  parts = path.with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _layer(module):
  """Returns the most specific layer: scripts.job rather than scripts."""
  layers = [layer for layer in _MAY_IMPORT if _within(module, layer)]
  return max(layers, key=len, default=None)


def _our_imports(path):
  for name in _imports(_ROOT / path):
    if any(_within(name, package) for package in _OURS):
      yield name


@pytest.mark.parametrize("path", _SOURCES, ids=str)
def test_modules_import_only_allowed_layers(path):
  module = _module(path)
  layer = _layer(module)
  if module == "atlas_jax":
    assert not list(_our_imports(path))
    return
  assert layer, f"{module} belongs to no layer: add one to _MAY_IMPORT"
  for name in _our_imports(path):
    assert any(_within(name, each) for each in _MAY_IMPORT[layer] | {layer}), (
      f"{module} may not import {name}"
    )


def test_layers_have_no_import_cycle():
  imported = {layer: set() for layer in _MAY_IMPORT}
  for path in _SOURCES:
    layer = _layer(_module(path))
    # Left out: modules directly in scripts, such as scripts.program.
    if layer and layer != "scripts":
      imported[layer] |= {_layer(name) for name in _our_imports(path)}
  sorter = graphlib.TopologicalSorter(
    {layer: others - {layer, None} for layer, others in imported.items()}
  )
  sorter.prepare()  # Raises CycleError.


@pytest.mark.parametrize("path", _SOURCES, ids=str)
def test_heavy_dependencies_are_imported_only_where_allowed(path):
  for name in _imports(_ROOT / path):
    for heavy, rooms in _ONLY_IN.items():
      if _within(name, heavy):
        assert path.as_posix().startswith(rooms), f"{path} imports {name}"


# The rollout environment has no JAX, so these must not import it, even
# indirectly.
_WITHOUT_JAX = (
  "rollout/server/app.py",
  "rollout/remote/client.py",
  "rollout/server/engine_vllm.py",
  "scripts/program.py",
)
_JAX = (
  "jax",
  "jaxlib",
  "flax",
  "optax",
  "orbax",
  "atlas_jax.models",
  "ml_collections",
)


@pytest.mark.parametrize("name", _WITHOUT_JAX)
def test_the_rollout_environment_needs_no_jax(name):
  seen, paths = set(), [_ROOT / name]
  while paths:
    path = paths.pop()
    if path in seen or not path.is_file():
      continue
    seen.add(path)
    for imported in _imports(path):
      assert not any(_within(imported, heavy) for heavy in _JAX), (
        f"{name} imports {imported} through {path.relative_to(_ROOT)}"
      )
      if any(_within(imported, package) for package in _OURS):
        # `imported` is a package, a module, or a name in a module.
        file = _ROOT.joinpath(*imported.split("."))
        paths += [file / "__init__.py", file.with_suffix(".py")]
        paths += [file.parent / "__init__.py", file.parent.with_suffix(".py")]


_UNSAFE_MODULES = (
  "pickle",
  "cloudpickle",
  "dill",
  "marshal",
  "shelve",
  "joblib",
)
_UNSAFE_CALLS = {"eval", "exec", "os.system", "os.popen", "torch.load"}
_UNSAFE_KEYWORDS = {
  "shell",
  "trust_remote_code",
  "allow_pickle",
  "trust_env",
}
_OPEN_ADDRESSES = {"0.0.0.0", "::"}
# A proxy of the environment would see tokens and prompts.
_HTTP_CLIENTS = {"httpx2.Client", "httpx2.AsyncClient"}
_PROXIED = {
  *("urllib.request.urlopen", "urllib.request.urlretrieve"),
  *(f"httpx2.{name}" for name in ("get", "post", "put", "request", "stream")),
}


def _is_unsafe(node):
  """Returns whether a syntax tree node is unsafe code."""
  match node:
    case ast.Assert():  # python -O removes it.
      return True
    case ast.ExceptHandler(type=caught):
      kinds = caught.elts if isinstance(caught, ast.Tuple) else [caught]
      names = {ast.unparse(kind) for kind in kinds if kind}
      return not names or bool(names & {"Exception", "BaseException"})
    case ast.Call(func=ast.Attribute(attr="from_pretrained"), keywords=given):
      # Without it, transformers prompts the user.
      return "trust_remote_code" not in {keyword.arg for keyword in given}
    case ast.Call(func=function, keywords=given):
      name = ast.unparse(function)
      if name in _HTTP_CLIENTS:
        return "trust_env" not in {keyword.arg for keyword in given}
      return name in _UNSAFE_CALLS | _PROXIED
    case ast.keyword(arg=name, value=value) if name in _UNSAFE_KEYWORDS:
      return not (isinstance(value, ast.Constant) and value.value is False)
    case ast.Constant(value=str(text)):
      return text in _OPEN_ADDRESSES
  return False


@pytest.mark.parametrize("path", _SOURCES, ids=str)
def test_sources_have_no_unsafe_code(path):
  tree = ast.parse((_ROOT / path).read_text())
  found = [
    f"line {node.lineno}: {ast.unparse(node)}"
    for node in ast.walk(tree)
    if _is_unsafe(node)
  ]
  assert not found, f"{path} has unsafe code: {found}"
  for name in _imports(_ROOT / path):
    assert not any(_within(name, module) for module in _UNSAFE_MODULES), name


@pytest.mark.parametrize(
  "line",
  [
    "assert x",
    "eval(x)",
    "exec(x)",
    "os.system(x)",
    "run(x, shell=True)",
    "run(x, shell=y)",
    "load(x, trust_remote_code=True)",
    "AutoTokenizer.from_pretrained(x)",
    "load(x, allow_pickle=True)",
    "serve('0.0.0.0')",
    "httpx2.AsyncClient()",
    "httpx2.Client(trust_env=True)",
    "httpx2.get(x)",
    "urllib.request.urlopen(x)",
    "try: x\nexcept: y",
    "try: x\nexcept Exception as e: y",
    "try: x\nexcept (OSError, BaseException): y",
  ],
)
def test_unsafe_code_is_detected(line):
  assert any(map(_is_unsafe, ast.walk(ast.parse(line))))


@pytest.mark.parametrize(
  "line",
  [
    "run(x, shell=False)",
    "load(x, trust_remote_code=False)",
    "AutoTokenizer.from_pretrained(x, trust_remote_code=False)",
    "model.eval()",
    "httpx2.Client(trust_env=False)",
    "serve('127.0.0.1')",
    "try: x\nexcept (OSError, ValueError): y",
  ],
)
def test_safe_code_passes(line):
  assert not any(map(_is_unsafe, ast.walk(ast.parse(line))))
