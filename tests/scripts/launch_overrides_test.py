# SPDX-License-Identifier: Apache-2.0
"""Tests which config values the overrides set, and that none is ignored."""

import pathlib

import pytest

from atlas_jax import errors
from scripts import launch_overrides, override_names

_ROOT = pathlib.Path(__file__).parents[2]
_RCL = "configs/run/teacher_rcl.py:smoke"
_SFT = "configs/run/teacher_sft.py:smoke"
_GKD = "configs/run/teacher_gkd.py:smoke"


# ml_collections loads config files with a deprecated importlib method.
pytestmark = pytest.mark.filterwarnings(
  "ignore:the load_module:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def _in_root(monkeypatch):
  monkeypatch.chdir(_ROOT)


def _resolve(recipe, *words, num_devices=1):
  return launch_overrides.resolve(recipe, words, num_devices=num_devices)


def _get(config, path):
  for key in path.split("."):
    config = config[key]
  return config


@pytest.mark.parametrize(
  "name",
  [
    "teacher_rcl:smoke",
    "teacher_rcl.py:smoke",
    "teacher_rcl.yaml:smoke",
    "configs/run/teacher_rcl.py:smoke",
    "configs/run/teacher_rcl.yaml:smoke",
    str(_ROOT / "configs/run/teacher_rcl.py:smoke"),
  ],
)
def test_a_recipe_is_found_by_any_form_of_its_name(name):
  found = launch_overrides.find_recipe(name)
  assert found.endswith(_RCL)
  assert (
    launch_overrides.find_recipe(name.partition(":")[0])
    == found[: -len(":smoke")]
  )


def test_an_unknown_recipe_is_an_error_with_a_suggestion():
  with pytest.raises(errors.ConfigError, match="Unknown recipe") as caught:
    launch_overrides.find_recipe("configs/run/teacher_rcel.yaml")
  assert caught.value.exit_code == 2
  assert caught.value.fix == "Did you mean teacher_rcl?"


@pytest.mark.parametrize("name", override_names.TABLE)
def test_every_path_of_the_table_is_in_a_recipe(name):
  configs = [_resolve(recipe).config for recipe in (_RCL, _SFT, _GKD)]
  for path in override_names.TABLE[name].paths:
    assert any(launch_overrides.has(config, path) for config in configs), path


@pytest.mark.parametrize(
  ("recipe", "word", "path", "value"),
  [
    (_RCL, "model_name_or_path=m", "model.path", "m"),
    (_RCL, "student_model=s", "student.path", "s"),
    (_RCL, "dataset_id_or_path=d.jsonl", "data.path", "d.jsonl"),
    (_RCL, "seed=3", "seed", 3),
    (_RCL, "max_steps=4", "loop.num_steps", 4),
    (_RCL, "eval_steps=1", "loop.eval_every", 1),
    (_RCL, "save_steps=5", "loop.save_every", 5),
    (_RCL, "save_strategy=no", "loop.save_every", 0),
    (_GKD, "teacher_model_name_or_path=t", "teacher.path", "t"),
    (_GKD, "lmbda=0.25", "completions.on_policy_fraction", 0.25),
    (_GKD, "beta=0.1", "loss.beta", 0.1),
    (_GKD, "temperature=0.7", "sampling.complete.temperature", 0.7),
    (_GKD, "max_new_tokens=9", "sampling.complete.max_completion_tokens", 9),
    (_GKD, "train_batch_size=16", "batch.num_prompts", 16),
    (_GKD, "max_steps=4", "num_epochs", 0),
    (_RCL, "eval_strategy=no", "loop.eval_every", 0),
    (_RCL, "logging_steps=2", "loop.log_every", 2),
    (_RCL, "save_final_model=false", "export.enabled", False),
    (_RCL, "learning_rate=5e-7", "schedule.learning_rate", 5e-7),
    (_RCL, "num_generations=4", "sampling.teach.group_size", 4),
    (_RCL, "temperature=0.5", "sampling.probe.temperature", 0.5),
    (_RCL, "temperature=0.5", "sampling.teach.temperature", 0.5),
    (_RCL, "temperature=0.5", "sampling.baseline.temperature", 0.5),
    (_RCL, "temperature=0.5", "sampling.solve.temperature", 0.5),
    (_RCL, "max_probe_tokens=9", "sampling.probe.max_completion_tokens", 9),
    (
      _RCL,
      "max_completion_length=9",
      "sampling.teach.max_completion_tokens",
      9,
    ),
    (
      _RCL,
      "max_completion_length=9",
      "sampling.solve.max_completion_tokens",
      9,
    ),
    (_RCL, "beta=0.1", "loss.kl_coef", 0.1),
    (_RCL, "ref_model_sync_steps=2", "reference.sync_every", 2),
    (_RCL, "ref_model_mixup_alpha=0.9", "reference.mix", 0.9),
    (_RCL, "efficiency_weight=0.5", "reward.teaching.efficiency_weight", 0.5),
    (
      _RCL,
      "degradation_penalty_multiplier=2.0",
      "reward.teaching.degradation_penalty_multiplier",
      2.0,
    ),
    (_RCL, "gradient_accumulation_steps=4", "batch.per_device", 32),
    (_RCL, "train_batch_size=64", "batch.num_questions", 8),
    (_RCL, "warmup_ratio=0.5", "schedule.warmup_fraction", 0.5),
    (_RCL, "warmup_steps=5", "schedule.warmup_steps", 5),
    (_RCL, "warmup_steps=5", "schedule.warmup_fraction", 0.0),
    (_RCL, "lr_scheduler_type=linear", "schedule.schedule", "linear"),
    (_RCL, "lr_scheduler_type=warmup_stable_decay", "schedule.schedule", "wsd"),
    (_RCL, "optim=muon", "optimizer.name", "muon"),
    (_RCL, "optim=lion_32bit", "optimizer.name", "lion"),
    (_RCL, "adam_beta2=0.5", "optimizer.adamw.beta2", 0.5),
    (_RCL, "weight_decay=0.5", "optimizer.weight_decay", 0.5),
    (_RCL, "save_total_limit=7", "checkpoint.keep", 7),
    (
      _RCL,
      "metric_for_best_model=eval_teaching/NDR",
      "checkpoint.best_metric",
      "eval/teaching/NDR",
    ),
    (_RCL, "greater_is_better=False", "checkpoint.best_mode", "min"),
    (_RCL, "load_best_model_at_end=true", "checkpoint.load_best", True),
    (_SFT, "train_batch_size=64", "batch.size", 64),
    (_SFT, "per_device_train_batch_size=8", "batch.per_device", 8),
    (_SFT, "gradient_accumulation_steps=4", "batch.per_device", 8),
    (_SFT, "num_train_epochs=0.5", "num_epochs", 0.5),
    (_SFT, "num_train_epochs=1", "num_epochs", 1),
    (_SFT, "max_steps=4", "loop.num_steps", 4),
    (_SFT, "max_steps=4", "num_epochs", 0),
    (_SFT, "max_steps=-1", "num_epochs", 6),
    (_SFT, "max_seq_length=64", "packing.length", 64),
    (_SFT, "packing=false", "packing.packed", False),
    (_RCL, "--config.loop.num_steps=4", "loop.num_steps", 4),
    (_SFT, "report_to=tensorboard,wandb", "report.to", "tensorboard,wandb"),
    (_RCL, "wandb_run_name=first", "report.name", "first"),
  ],
)
def test_a_name_sets_its_config_value(recipe, word, path, value):
  job = _resolve(recipe, word)
  assert _get(job.config, path) == value
  assert _get(_resolve(recipe).config, path) != value or path == "num_epochs"


def test_strategy_steps_keeps_the_intervals_of_the_recipe():
  assert _resolve(_RCL, "save_strategy=steps").settings == ()


def test_report_to_null_disables_trackers():
  for word in ("report_to=null", "report_to=none", "report_to=[]"):
    assert _resolve(_RCL, "report_to=wandb", word).config.report.to == "none"


@pytest.mark.parametrize(
  ("words", "num_devices", "per_device"),
  [
    (["per_device_train_batch_size=4"], 1, 4),
    (["per_device_train_batch_size=4", "train_batch_size=32"], 2, 4),
    (["gradient_accumulation_steps=16"], 1, 8),
    (["gradient_accumulation_steps=16"], 4, 2),
    (["num_generations=4", "gradient_accumulation_steps=16"], 2, 2),
    (
      ["per_device_train_batch_size=4", "gradient_accumulation_steps=32"],
      1,
      4,
    ),
  ],
)
def test_microbatch_options_set_the_rows_per_device(
  words, num_devices, per_device
):
  job = _resolve(_RCL, *words, num_devices=num_devices)
  assert job.config.batch.per_device == per_device


@pytest.mark.parametrize(
  ("recipe", "word", "message"),
  [
    (_RCL, "max_step=4", "Did you mean max_steps?"),
    (_RCL, "max_prompt_length=9", "Valid names are"),
    (_RCL, "zero1", "always sharded together"),
    (_RCL, "--workdir=x", "Valid names are"),
    (_RCL, "num_train_epochs=1", "not have this setting"),
    (_SFT, "beta=0.1", "not have this setting"),
    (_SFT, "student_model=s", "not have this setting"),
    (_RCL, "model_name_or_path=null", "needs a value"),
    (_RCL, "max_steps=soon", "invalid literal"),
    (_RCL, "train_batch_size=30", "30 sequences are not divisible by 8"),
    (_RCL, "per_device_train_batch_size=5", "128 sequences are not divisible"),
    (_RCL, "train_batch_size=0", "at least 1"),
    (_RCL, "vllm_port=http", "must be a port number"),
    (_RCL, "save_strategy=epoch", "must be no or steps"),
    (_RCL, "--config.loop.num_step=4", 'Did you mean "num_steps"'),
  ],
)
def test_invalid_overrides_are_errors(recipe, word, message):
  with pytest.raises(errors.ConfigError) as caught:
    _resolve(recipe, word)
  assert message.lower() in str(caught.value).lower()
  assert word.rpartition("=")[2] in caught.value.where
  assert caught.value.exit_code == 2


@pytest.mark.parametrize(
  ("recipe", "words", "offloaded"),
  [
    (_RCL, ["max_steps=4", "offload"], {"optimizer": True, "reference": True}),
    (_RCL, ["offload", "beta=0"], {"optimizer": True, "reference": False}),
    (_SFT, ["offload", "max_steps=4"], {"optimizer": True}),
    (_SFT, [], {"optimizer": False}),
    (_RCL, [], {"optimizer": False, "reference": False}),
  ],
)
def test_offload_is_accepted_in_any_position(recipe, words, offloaded):
  assert _resolve(recipe, *words).config.offload.to_dict() == offloaded


def test_contradicting_batch_sizes_are_an_error():
  with pytest.raises(errors.ConfigError, match="requires 32"):
    _resolve(
      _RCL, "per_device_train_batch_size=4", "gradient_accumulation_steps=2"
    )


def test_a_recipe_without_data_is_an_error():
  with pytest.raises(errors.ConfigError, match="path is not set"):
    _resolve("configs/run/teacher_rcl.py")
  job = _resolve("configs/run/teacher_rcl.py", "dataset_id_or_path=q.jsonl")
  assert job.config.data.path == "q.jsonl"


@pytest.mark.parametrize(
  ("words", "workdir"),
  [
    ([], "results/teacher_rcl-smoke"),
    (["results_dir=runs"], "runs/teacher_rcl-smoke"),
    (["output_dir=here", "results_dir=runs"], "here"),
  ],
)
def test_output_names_set_the_workdir(words, workdir):
  assert _resolve(_RCL, *words).workdir == pathlib.Path(workdir)


def test_the_docs_page_matches_the_table():
  page = (_ROOT / "docs/overrides.md").read_text("utf-8")
  assert page == launch_overrides.markdown(), (
    "Run python -m scripts.launch_overrides > docs/overrides.md"
  )
