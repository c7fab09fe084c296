# SPDX-License-Identifier: Apache-2.0
"""Tests that config sections match their functions and every key is read."""

import ast
import functools
import importlib
import inspect
import pathlib

import ml_collections
import optax
import pytest

from atlas_jax import checkpoint, sharding, types
from atlas_jax.data import columns, sets
from atlas_jax.losses import advantages, correction, grpo
from atlas_jax.rewards import combine, custom, grading, rlt, rules
from atlas_jax.rewards import teaching as teaching_reward
from atlas_jax.teaching import roles, templates
from atlas_jax.train import (
  batch_shapes,
  gkd,
  gkd_batches,
  loop,
  optimizer,
  schedule,
  score,
  train_state,
)
from atlas_jax.train import sft as train_sft
from atlas_jax.train.guards import alarm
from atlas_jax.train.telemetry import samples, sinks
from rollout import sampler as rollout_sampler
from scripts import config_docs, small_world
from scripts.job import components, config_keys, exports
from tests import fakes

_ROOT = pathlib.Path(__file__).parents[1]
_RECIPES = sorted(
  path.stem
  for path in (_ROOT / "configs/run").glob("*.py")
  if path.stem != "__init__"
)

# Section: the function its keys are arguments of, and arguments code adds.
_FUNCTIONS = {
  "world": (small_world.ensure, ()),
  "model": (components.open_model, ()),
  "student": (components.open_model, ()),
  "teacher": (components.open_model, ()),
  "mesh": (sharding.make_mesh, ()),
  "data": (sets.Selection, ()),
  "data.columns": (columns.Columns, ()),
  "held_out": (sets.HeldOut, ()),
  "sampler": (
    rollout_sampler.open_sampler,
    ("directory", "model", "params", "tokenizer", "mesh"),
  ),
  "rollout": (rollout_sampler.Settings, ()),
  "templates": (templates.Templates, ()),
  "sampling.probe": (types.SamplingParams, ("seed",)),
  "sampling.baseline": (types.SamplingParams, ("seed",)),
  "sampling.teach": (types.SamplingParams, ("seed",)),
  "sampling.solve": (types.SamplingParams, ("seed",)),
  "roles.policy": (roles.Role, ("sampler", "tokenizer", "max_thinking_tokens")),
  "roles.student": (roles.Role, ("sampler", "tokenizer")),
  "reward": (combine.open_reward, ("functions", "student", "max_tokens")),
  "reward.weights": (combine.Weights, ()),
  "reward.teaching": (teaching_reward.build, ()),
  "reward.rlt": (rlt.build, ("student",)),
  "reward.rlt.coefficients": (rlt.Coefficients, ()),
  "reward.overlong": (rules.overlong, ("max_tokens",)),
  "reward.math_verify": (grading.open_grader, ("from_first",)),
  "math_verify": (grading.open_grader, ("from_first",)),
  "advantages": (advantages.group_advantages, ()),
  "correction": (correction.sampler_weights, ()),
  "alarm": (alarm.Alarm, ()),
  "logits": (score.token_stats, ("temperature",)),
  "experts": (score.check_balance, ()),
  "schedule": (schedule.make, ("num_steps",)),
  "lora": (components.open_policy, ("seed",)),
  "optimizer": (optimizer.make_optimizer, ()),
  "offload": (train_state.Offload, ()),
  "optimizer.adamw": (optimizer._adamw, ()),
  "optimizer.lion": (optimizer._lion, ()),
  "optimizer.adafactor": (optimizer._adafactor, ()),
  "optimizer.muon": (optimizer._muon, ()),
  "loop": (loop.Settings, ()),
  "samples": (samples.SampleLog, ("writer", "seed")),
  "report": (sinks.open_sinks, ("workdir", "resolved")),
  "checkpoint": (checkpoint.Checkpointer, ("identity",)),
  "export": (exports.write, ("facts",)),
}
_SFT = _FUNCTIONS | {
  "batch": (sharding.num_microbatches, ()),
  "packing": (sets.Layout, ()),
  "loss": (train_sft.packed_loss, ("router_aux_coef",)),
}
_GRPO = _FUNCTIONS | {
  "loss": (grpo.Objective, ("max_tokens",)),
  "packing": (
    batch_shapes.Layout,
    (
      "per_device",
      "num_minibatches",
      "num_shards",
      "max_sequences",
      "max_length",
    ),
  ),
}
_GKD = _FUNCTIONS | {
  "sampling.complete": (types.SamplingParams, ("seed",)),
  "packing": (sets.Layout, ()),
  "completions": (
    gkd_batches.CompletionBatches,
    (
      "params",
      "vocab_size",
      "chunk_tokens",
      "max_prob_error",
      "compare_every",
    ),
  ),
  "loss": (gkd.packed_loss, ("router_aux_coef",)),
}
_GRPO_READERS = (
  "scripts/train_grpo.py",
  "atlas_jax/train/grpo.py",
  "atlas_jax/train/grpo_update.py",
  "atlas_jax/train/batch_shapes.py",
)
# Recipe: the functions of its sections, and the files that read all other keys.
# Add a row for each new recipe.
_READERS = {
  "teacher_sft": (_SFT, ("scripts/train_sft.py", "atlas_jax/train/sft.py")),
  "world_student": (_SFT, ("scripts/train_sft.py", "atlas_jax/train/sft.py")),
  "teacher_rcl": (_GRPO, _GRPO_READERS),
  "teacher_rlt": (_GRPO, _GRPO_READERS),
  "rlvr": (_GRPO, _GRPO_READERS),
  "teacher_gkd": (
    _GKD,
    (
      "scripts/train_gkd.py",
      "atlas_jax/train/gkd.py",
      "atlas_jax/train/batch_shapes.py",
    ),
  ),
  "teaching_eval": (_FUNCTIONS, ("scripts/evaluate.py",)),
  "answer_eval": (_FUNCTIONS, ("scripts/evaluate.py",)),
}


def _module(recipe):
  return importlib.import_module(f"configs.run.{recipe}")


def _has_variants(recipe):
  parameters = inspect.signature(_module(recipe).get_config).parameters
  return "variant" in parameters


_LOSSES = sorted(
  path.stem for path in (_ROOT / "configs/loss").glob("[!_]*.py")
)
_VARIANTS = [
  (recipe, variant)
  for recipe in _RECIPES
  for variant in (("full", "smoke") if _has_variants(recipe) else ("",))
] + [
  (recipe, variant)
  for recipe in ("teacher_rcl", "rlvr")
  for loss in _LOSSES
  for variant in (loss, f"smoke,{loss}")
]


def _config(recipe, variant):
  get_config = _module(recipe).get_config
  return get_config(variant) if variant else get_config()


def _sections(config, prefix=""):
  """Yields every section with its dotted name; "" is the whole config."""
  yield prefix, config
  for key, value in _items(config):
    if isinstance(value, ml_collections.ConfigDict):
      yield from _sections(value, f"{prefix}.{key}".lstrip("."))


def _items(section):
  # Reading an unset required value would raise; its reference does not.
  return section.items(preserve_field_references=True)


@functools.cache
def _reads(path):
  """Returns attributes a file reads, as `section.key`."""
  found = set()
  for node in ast.walk(ast.parse((_ROOT / path).read_text())):
    if isinstance(node, ast.Attribute):
      owner = node.value
      name = getattr(owner, "attr", getattr(owner, "id", ""))
      found.add(f"{name.lstrip('_')}.{node.attr}")
  return found


def test_every_recipe_has_a_reader():
  assert set(_RECIPES) == set(_READERS)


@pytest.mark.parametrize(("recipe", "variant"), _VARIANTS)
def test_section_keys_match_keywords_of_their_function(recipe, variant):
  functions, _ = _READERS[recipe]
  for name, section in _sections(_config(recipe, variant)):
    if name in functions:
      function, added = functions[name]
      parameters = inspect.signature(function).parameters.values()
      required = {
        p.name
        for p in parameters
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty
      }
      keys = set(section)
      assert required - set(added) <= keys, f"{name} lacks keys"
      allowed = {p.name for p in parameters} - set(added)
      assert keys <= allowed, f"{name} has unknown keys"


@pytest.mark.parametrize(("recipe", "variant"), _VARIANTS)
def test_every_key_is_read(recipe, variant):
  functions, paths = _READERS[recipe]
  shared = (
    "atlas_jax/train/loop.py",
    "atlas_jax/train/train_state.py",
    "scripts/job/components.py",
    "scripts/job/exports.py",
    "scripts/launch.py",
  )
  reads = set.union(*map(_reads, (*paths, *shared)))
  for name, section in _sections(_config(recipe, variant)):
    # A section in `functions` is passed whole. Keys of any other section, and
    # of the config itself, must be read by name.
    owner = name.rpartition(".")[2] or "config"
    # A format is also passed whole, under a name the config chooses.
    is_format = name.startswith("data.formats")
    if name not in functions and name != "sampling" and not is_format:
      unread = [key for key in section if f"{owner}.{key}" not in reads]
      assert not unread, f"nothing reads {unread} of section {name!r}"


@pytest.mark.parametrize(("recipe", "variant"), _VARIANTS)
def test_functions_accept_the_values(recipe, variant, tmp_path):
  config = _config(recipe, variant)
  if "sampling" in config:
    for section in config.sampling.values():
      types.SamplingParams(**section, seed=0)
  if "templates" in config:
    templates.Templates(**config.templates)
  if "reward" in config:
    max_tokens = config.sampling.teach.max_completion_tokens
    teaching_reward.build(**config.reward.teaching)
    rules.overlong(**config.reward.overlong, max_tokens=max_tokens)
    reader = rlt.Student(None, fakes.write_tokenizer(tmp_path), None)
    rlt.build(reader, **config.reward.rlt)
    none = custom.parse((), timeout_s=1.0, memory_gb=0.0)
    with combine.open_reward(
      **config.reward, functions=none, student=reader, max_tokens=max_tokens
    ):
      pass
  if "advantages" in config:
    grpo.Objective(**config.loss, max_tokens=1)
  if "schedule" in config:
    rate = schedule.make(**config.schedule, num_steps=10)
    chain = optimizer.make_optimizer(rate, **config.optimizer)
    assert isinstance(chain, optax.GradientTransformation)
  sharding.make_mesh(**config.mesh)


@pytest.mark.parametrize("recipe", [r for r in _RECIPES if _has_variants(r)])
def test_an_unknown_variant_raises(recipe):
  with pytest.raises(ValueError, match=r"there is :smoke"):
    _config(recipe, "tiny")


@pytest.mark.parametrize("recipe", ["teacher_rcl", "teacher_rlt", "rlvr"])
@pytest.mark.parametrize("size", ["full", "smoke"])
def test_dapo_penalizes_long_completions_instead_of_masking(recipe, size):
  dapo, other = (_config(recipe, f"{size},{loss}") for loss in ("dapo", "gspo"))
  assert (dapo.reward.weights.overlong, dapo.batch.mask_truncated) == (1, False)
  assert (other.reward.weights.overlong, other.batch.mask_truncated) == (
    0,
    True,
  )
  assert dapo.reward.overlong.soft_fraction == 0.2
  # The rest of the reward is the recipe's.
  dapo.reward.weights.overlong = other.reward.weights.overlong
  assert dapo.reward == other.reward


@pytest.mark.parametrize("recipe", ["teacher_rlt", "rlvr"])
@pytest.mark.parametrize("loss", _LOSSES)
def test_a_loss_is_the_same_in_every_recipe(recipe, loss):
  ours, base = (_config(r, f"smoke,{loss}") for r in (recipe, "teacher_rcl"))
  for section in ("loss", "advantages", "groups", "batch"):
    assert ours[section].to_dict() == base[section].to_dict()


def _resolve(reader):
  """Returns the function or class of a full name, or one below atlas_jax."""
  if not reader.startswith(("scripts.", "rollout.")):
    reader = f"atlas_jax.{reader}"
  module, _, name = reader.rpartition(".")
  return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("recipe", _RECIPES)
def test_every_key_has_a_meaning_and_every_section_a_reader(recipe):
  functions, _ = _READERS[recipe]
  keys = config_keys.read(_ROOT / f"configs/run/{recipe}.py")
  for name, section in _sections(_config(recipe, "")):
    for key, value in _items(section):
      if not isinstance(value, ml_collections.ConfigDict):
        found = keys[f"{name}.{key}".lstrip(".")]
        assert found.meaning, f"{name}.{key} has no comment"
        if name and found.reader:
          expected, _ = functions.get(name, (_resolve(found.reader), ()))
          assert _resolve(found.reader) is expected, f"{name}: {found.reader}"


def test_the_page_of_config_keys_is_fresh():
  page = (_ROOT / "docs/config.md").read_text()
  assert page == config_docs.markdown(), (
    "Run python -m scripts.config_docs > docs/config.md"
  )
