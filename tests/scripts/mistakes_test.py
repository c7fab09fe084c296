# SPDX-License-Identifier: Apache-2.0
"""Feeds wrong command lines to every script: no traceback, and the right code.

Each line is a case: the script, its words, the exit code and a part of the
message. `{folder}` has a model, a workdir with an export, and data.
"""

import itertools
import json

import pytest

from tests import processes, tiny

_SFT = "--config=configs/run/teacher_sft.py:smoke"
_RCL = "--config=configs/run/teacher_rcl.py:smoke"
_GKD = "--config=configs/run/teacher_gkd.py:smoke"
_EVAL = "--config=configs/run/teaching_eval.py:smoke"
_SFT_RUN = (
  f"{_SFT} --workdir={{new}} --config.world.directory= "
  "--config.model.path={folder}/model --config.data.path={folder}/data.jsonl "
  "--config.packing.length=64 --config.batch.size=4"
)
_RCL_RUN = (
  f"{_RCL} --workdir={{new}} --config.world.directory= "
  "--config.model.path={folder}/model --config.student.path={folder}/model "
  "--config.data.path={folder}/data.jsonl --config.held_out.path="
)
_GKD_RUN = (
  f"{_GKD} --workdir={{new}} --config.world.directory= "
  "--config.model.path={folder}/model --config.teacher.path={folder}/model "
  "--config.data.path={folder}/data.jsonl --config.packing.length=64"
)
_EVAL_RUN = (
  f"{_EVAL} --workdir={{new}} --config.world.directory= "
  "--config.model.path={folder}/model --config.student.path={folder}/model "
  "--config.data.path={folder}/data.jsonl"
)
_SERVE = "--engine=jax --role=policy --port={port}"

_NUMBERS = itertools.count()

_CASES = {
  "train_sft": [
    ("", 2, "--config is not set"),
    (f"{_SFT}", 2, "--workdir is not set"),
    (f"{_SFT} more", 2, "Unexpected arguments"),
    (f"{_RCL} --workdir=results/new", 2, "scripts.train_grpo"),
    ("--config=configs/run/teacher_stf.py", 2, "configs/run/teacher_stf.py"),
    ("--config=configs/run/teacher_sft.py:tiny", 2, "there is :smoke"),
    ("--config=configs/model/hf.py", 2, "Invalid flags"),
    ("--config=configs/mesh.py", 2, "config.recipe must be 'sft'"),
    ("--config=README.md", 2, "Unknown recipe"),
    (f"{_SFT} --learning_rate=1", 2, "--config.schedule.learning_rate"),
    (f"{_SFT} --per_device_train_batch_size=1", 2, "--config.batch.per_device"),
    (f"{_SFT} --num_train_epochs=1", 2, "--config.num_epochs"),
    (f"{_SFT} --config.lora.r=1", 2, "--config.lora"),
    (f"{_SFT} --config.batch.size=many", 2, "batch.size"),
    (f"{_SFT} --config.batch=4", 2, "config.batch"),
    (f"{_SFT} --config.num_epochs=1e", 2, "config.num_epochs"),
    (f"--config.seed=1 {_SFT}", 2, "before a value for --config"),
    (f"{_SFT} --plan=8xH101", 2, "Unknown device"),
    (f"{_SFT} --plan=H100", 2, "COUNTxDEVICE"),
    (f"{_SFT_RUN} --config.model.dtype=bf17", 2, "--config.model.dtype=bf17"),
    (f"{_SFT_RUN} --config.model.dtype=fp16", 2, "float32, bfloat16"),
    (f"{_SFT_RUN} --config.model.remat=full", 2, "none, dots, block, offload"),
    (f"{_SFT_RUN} --config.model.attention=flash", 2, "cudnn"),
    (f"{_SFT_RUN} --config.model.param_dtype=nf4", 2, "nf4"),
    (f"{_SFT_RUN} --config.batch.size=0", 2, "batch.size"),
    (f"{_SFT_RUN} --config.batch.size=-4", 2, "batch.size"),
    (f"{_SFT_RUN} --config.batch.per_device=3", 2, "per_device"),
    (f"{_SFT_RUN} --config.mesh.fsdp=3", 2, "--config.mesh"),
    (f"{_SFT_RUN} --config.optimizer.name=sgd", 2, "Unknown optimizer"),
    (f"{_SFT_RUN} --config.optimizer.lion.beta1=0.8", 2, "not used"),
    (f"{_SFT_RUN} --config.schedule.schedule=linear2", 2, "schedule"),
    (f"{_SFT_RUN} --config.schedule.warmup_fraction=2.0", 2, "warmup"),
    (f"{_SFT_RUN} --config.packing.too_long=split", 2, "too_long"),
    (f"{_SFT_RUN} --config.packing.length=-1", 2, "packing.length"),
    (f"{_SFT_RUN} --config.num_epochs=-1", 2, "num_epochs"),
    (f"{_SFT_RUN} --config.lora.targets=('[',)", 2, "--config.lora.targets=["),
    (f"{_SFT_RUN} --config.optimizer.frozen=('(',)", 2, "optimizer.frozen=("),
    (f"{_SFT_RUN} --config.mesh.tensor=-1", 2, "At most one mesh axis"),
    (f"{_SFT_RUN} --config.schedule.learning_rate=-1.0", 2, "learning_rate"),
    (f"{_SFT_RUN} --config.data.max_rows=-1", 2, "data.max_rows"),
    (f"{_SFT_RUN} --config.loss.chunk_tokens=0", 2, "loss.chunk_tokens"),
    (f"{_SFT_RUN} --config.loop.log_every=0", 2, "log_every"),
    (f"{_SFT_RUN} --config.loop.profile_steps=x", 2, "profile_steps"),
    (f"{_SFT_RUN} --config.report.to=wandbb", 2, "Unknown tracker"),
    (f"{_SFT_RUN} --config.checkpoint.best_mode=low", 2, "best_mode"),
    (f"{_SFT_RUN} --config.checkpoint.keep=0", 2, "keep"),
    (f"{_SFT_RUN} --config.held_out.fraction=1.5", 2, "held_out.fraction"),
    (f"{_SFT_RUN} --config.model.path={{folder}}/gone", 5, "does not exist"),
    (f"{_SFT_RUN} --config.model.path=./gone/too", 5, "does not exist"),
    (f"{_SFT_RUN} --config.model.path={{folder}}/run", 5, "run/export?"),
    (f"{_SFT_RUN} --config.model.path={{folder}}/data.jsonl", 5, "got a file"),
    (f"{_SFT_RUN} --config.lora.rank=-1", 2, "lora.rank"),
    (f"{_SFT_RUN} --workdir={{folder}}/data.jsonl", 2, "not writable"),
    (f"{_SFT_RUN} --num_processes=2", 2, "set together"),
    (f"{_SFT_RUN} --config.export.dtype=int8", 2, "--config.export.dtype"),
    (f"{_SFT_RUN} --profile_steps=5:3", 2, "profile_steps"),
  ],
  "train_grpo": [
    (f"{_SFT} --workdir={{new}}", 2, "scripts.train_sft"),
    (f"{_RCL} --beta=0.1", 2, "--config.loss.kl_coef"),
    (f"{_RCL} --max_completion_length=4", 2, "max_completion_tokens"),
    (f"{_RCL} --config.actor.optim.lr=1", 2, "--config.schedule.learning_rate"),
    (f"{_RCL_RUN} --config.data.format=alpacca", 2, "format"),
    (f"{_RCL_RUN} --config.data.path={{folder}}/none.jsonl", 3, "none.jsonl"),
    (f"{_RCL_RUN} --config.data.path={{folder}}/bad.jsonl", 3, "bad.jsonl"),
    (f"{_RCL},dpo", 2, "there is :smoke"),
    (f"{_RCL_RUN} --config.sampling.teach.temperature=-1", 2, "sampling.teach"),
    (f"{_RCL_RUN} --config.sampling.teach.group_size=0", 2, "sampling.teach"),
    (f"{_RCL_RUN} --config.loss.ratio=tokens", 2, "ratio"),
    (f"{_RCL_RUN} --config.advantages.scale=std", 2, "scale"),
    (f"{_RCL_RUN} --config.correction.level=word", 2, "level"),
    (f"{_RCL_RUN} --config.reward.teaching.preset=R9", 2, "preset"),
    (f"{_RCL_RUN} --config.rollout.backend=vllm", 2, "rollout.backend"),
    (f"{_RCL_RUN} --config.student.path={{folder}}/gone", 5, "gone"),
    (f"{_RCL_RUN} --config.templates.probe=nothing", 2, "probe"),
    (f"{_RCL_RUN} --config.batch.num_questions=0", 2, "num_questions"),
    (f"{_RCL_RUN} --config.reference.mix=2.0", 2, "reference.mix"),
    (f"{_RCL_RUN} --config.samples.stored_fraction=2.0", 2, "stored_fraction"),
    (f"{_RCL_RUN} --reward_fn=nothing", 2, "reward_fn"),
  ],
  "train_gkd": [
    (f"{_RCL} --workdir=results/new", 2, "scripts.train_grpo"),
    (f"{_GKD} --lmbda=0.5", 2, "--config.completions.on_policy_fraction"),
    (f"{_GKD_RUN} --config.loss.beta=1.5", 2, "beta"),
    (f"{_GKD_RUN} --config.completions.on_policy_fraction=2.0", 2, "on_policy"),
    (f"{_GKD_RUN} --config.teacher.path={{folder}}/gone", 5, "gone"),
    (f"{_GKD_RUN} --config.batch.num_prompts=0", 2, "num_prompts"),
  ],
  "evaluate": [
    (f"{_SFT} --workdir={{new}}", 2, "scripts.train_sft"),
    (f"{_EVAL_RUN} --profile_steps=1:2", 2, "training recipe"),
    (f"{_EVAL_RUN} --config.model.path={{folder}}/run", 5, "run/export?"),
    (f"{_EVAL_RUN} --config.batch_size=0", 2, "batch_size"),
    (f"{_EVAL_RUN} --config.data.path={{folder}}/none.jsonl", 3, "none.jsonl"),
    (f"{_EVAL} --config.max_tokens=4", 2, "max_completion_tokens"),
  ],
  "convert": [
    ("", 2, "--help"),
    ("inspect", 2, "--help"),
    ("invert a b", 2, "Got invert a b"),
    ("inspect {folder}/gone", 5, "gone"),
    ("inspect {folder}/data.jsonl", 5, "data.jsonl"),
    ("verify {folder}/model {folder}/gone", 5, "gone"),
    ("to_hf {folder}/gone {folder}/out --source={folder}/model", 5, "gone"),
    ("to_hf {folder}/model {folder}/out", 5, "No checkpoint found"),
    ("from_hf {folder}/run {folder}/out", 5, "run/export?"),
    ("from_gguf {folder}/data.jsonl {folder}/out", 5, "data.jsonl"),
    ("from_hf {folder}/model {folder}/out --dtype=int4", 2, "--dtype"),
    ("merge --base={folder}/model", 2, "merge"),
  ],
  "serve": [
    ("", 2, "--engine"),
    ("--engine=sglang", 2, "vllm|jax"),
    (f"{_SERVE}", 2, "--model"),
    (f"{_SERVE} --model={{folder}}/gone", 5, "gone"),
    (f"{_SERVE} --model={{folder}}/run", 5, "run/export?"),
    (f"{_SERVE} --model={{folder}}/model --dtype=fp16", 2, "dtype"),
    (f"{_SERVE} --model={{folder}}/model --kv_cache_gib=1", 2, "kv_cache_gib"),
    (f"{_SERVE} --model={{folder}}/model --host=0.0.0.0", 2, "token"),
    (f"{_SERVE} --model={{folder}}/model --port=99999", 2, "port"),
    ("--engine=vllm --role=policy --model={folder}/model", 2, "not installed"),
  ],
  "report": [
    ("--before=a", 2, "after"),
    ("--before={folder}/gone --after={folder}/gone", 3, "gone"),
    ("--before=a,b --after=a", 2, "same length"),
  ],
  "launch": [
    ("", 2, "number of devices"),
    ("1", 2, "recipe"),
    ("one teacher_sft", 2, "number of devices"),
    ("1 teacher_stf", 2, "teacher_sft"),
    ("1 teacher_sft:smoke lr=1", 2, "--config.schedule.learning_rate"),
    ("1 teacher_sft:smoke learning_rat=1", 2, "Did you mean learning_rate?"),
    (
      "1 teacher_sft:smoke --config.optimizer.lr=1",
      2,
      "schedule.learning_rate",
    ),
    ("1 teacher_sft", 2, "data.path is not set"),
    ("1 teacher_sft:smoke train_batch_size=x", 2, "train_batch_size"),
  ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("mistakes")
  for name in ("model", "run/export"):
    tiny.write_talker(folder / name, num_hidden_layers=1)
  (folder / "run/config.json").write_text('{"recipe": "sft"}')
  rows = [
    {"question": f"{i} + {i}?", "answer": str(2 * i), "solution": f"{2 * i}."}
    for i in range(40)
  ]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "data.jsonl").write_text(text)
  (folder / "bad.jsonl").write_text("{\n" * 40)
  return folder


def _start(script, words, folder, **environment):
  words = words.format(
    folder=folder,
    new=folder / f"new_{next(_NUMBERS)}",
    port=processes.free_port(),
  ).split()
  return processes.Job(
    script, words, environment={**processes.ENVIRONMENT, **environment}
  )


@pytest.mark.parametrize("script", _CASES)
def test_a_wrong_command_line_is_explained_without_a_traceback(script, folder):
  cases, wrong = list(_CASES[script]), []
  for pair in zip(cases[::2], [*cases[1::2], None], strict=False):
    jobs = [(case, _start(script, case[0], folder)) for case in pair if case]
    for (words, code, message), job in jobs:
      found, text = processes.end(job)
      if found != code or message not in text or "Traceback" in text:
        wrong.append(f"{words}: {found}, expected {code} and {message}\n{text}")
  assert not wrong, "\n\n".join(wrong)


def test_the_command_lines_are_many():
  assert sum(map(len, _CASES.values())) >= 60


@pytest.mark.parametrize(
  ("script", "expected"),
  [
    ("train_grpo", "--config.sampling.teach.group_size=32"),
    ("train_gkd", "--config.teacher.path="),
    ("evaluate", "--config.student.path="),
    ("convert", "from_gguf FILE OUT"),
    ("serve", "--engine=vllm|jax"),
    ("report", "--before=VALUE"),
    ("launch", "learning_rate=VALUE"),
    ("make_world", "--epochs=VALUE"),
  ],
)
def test_help_shows_purpose_settings_and_flags(script, expected, folder):
  code, text = processes.end(_start(script, "--help", folder))
  assert code == 0
  assert expected in text
  assert "-m scripts." in text or "bash scripts/" in text  # An example.
  assert "logtostderr" not in text


@pytest.mark.parametrize(
  ("script", "words", "row"),
  [
    (
      "train_sft",
      f"{_SFT} --config.model.dtype=bf16 --print_config",
      "model.dtype 'bfloat16' flag # Precision of activations",
    ),
    (
      "train_sft",
      f"{_SFT} --config.model.param_dtype=fp32 --print_config",
      "model.param_dtype 'float32' flag # Precision of parameters",
    ),
    (
      "train_grpo",
      f"{_RCL} --print_config",
      "loop.num_steps 60 :smoke # Steps",
    ),
    (
      "train_grpo",
      f"{_RCL} --print_config",
      "batch.num_iterations 1 recipe # ",
    ),
    ("evaluate", f"{_EVAL} --print_config", "mesh.data 1 default # Replicas"),
  ],
)
def test_print_config_works_without_a_workdir(script, words, row, folder):
  code, text = processes.end(_start(script, words, folder))
  assert code == 0, text
  assert row in " ".join(text.split())
