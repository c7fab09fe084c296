# SPDX-License-Identifier: Apache-2.0
"""Runs the commands of a user's first hour, each with its expected outcome.

The user brings data, a reward and a base model, runs `:smoke`, looks settings
up, makes mistakes, and evaluates and serves the result. install_test.py runs
the same commands from an installed wheel.
"""

from collections.abc import Mapping
import dataclasses
import functools
import gzip
import json
import os
import re

import httpx2
import jax
import pytest

from tests import fakes, processes, tiny

_EXAM = (
  "--config.data.path=exam.csv --config.data.columns.question=Task "
  "--config.data.columns.answer=Result"
)
_CHATML = "--config.model.chat_template=chatml"


@dataclasses.dataclass(frozen=True)
class _Command:
  """A command line, run in the user's folder, and its outcome.

  Attributes:
    script: in `scripts`.
    words: its arguments.
    code: of the exit.
    shown: texts of stdout or stderr; any whitespace in them is one space.
    written: texts of files.
    after: commands whose results it reads.
    environment: variables that it sets.
  """

  script: str
  words: str
  code: int = 0
  shown: tuple[str, ...] = ()
  written: Mapping[str, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )
  after: tuple[str, ...] = ()
  environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


_COMMANDS = {
  # Everyday data is recognized, and shown as it is trained; no model is read.
  "formats": _Command(
    "train_sft",
    "--config=teacher_sft --config.model.path=tokenizer --show_samples=3 "
    "--config.data.path="
    "alpaca.json,pairs.tsv,chats.jsonl.gz,turns.jsonl,text.jsonl,exam.jsonl",
    shown=(
      "in format alpaca",
      "--- alpaca.json:1",
      "Add. 2, 2<|im_end|> <|im_start|>assistant [[4<|im_end|>]]",
      "in format prompt_completion",
      "2 + 3?<|im_end|> <|im_start|>assistant [[5<|im_end|>]]",
      "in format sharegpt",
      "2 + 4?<|im_end|> <|im_start|>assistant [[6<|im_end|>]]",
      "in format messages",
      "2 + 5?<|im_end|> <|im_start|>assistant [[7<|im_end|>]]",
      "in format text",
      "T[[wo and two is four.<|im_end|>]]",
      "in format default",
      "2 + 6?<|im_end|> <|im_start|>assistant [[8<|im_end|>]]",
    ),
  ),
  "plain_text": _Command(
    "train_sft",
    "--config=teacher_sft --config.model.path=base --show_samples=1 "
    f"--config.model.chat_template=none {_EXAM}",
    shown=("0 + 0? [[0<|im_end|>]]",),
  ),
  # A base model writes no <teaching>: the cause is named, and the exit is 4.
  "untrained_teacher": _Command(
    "train_grpo",
    f"--config=teacher_rcl:smoke --workdir=untrained {_EXAM} "
    f"--config.world.directory= --config.model.path=base {_CHATML} "
    "--config.student.path=base --config.student.chat_template=chatml "
    "--config.held_out.path= --config.dry_pass=True "
    "--config.batch.num_questions=2 --config.sampling.teach.group_size=2 "
    "--config.loop.num_steps=1 --config.loop.require_updates=True "
    + " ".join(
      f"--config.sampling.{phase}.max_completion_tokens=8"
      for phase in ("probe", "baseline", "teach", "solve")
    ),
    code=4,
    shown=(
      "Dry pass of row ",
      " probe ",
      r" prompt <|im_start|>user\nTeach: ",
      " teaching none",
      " taught answer ",
      " answer without a teaching ",
      " reward 0 ",
      "completions lack <teaching>; ",
      "ALARM at step 1",
      "cause: 4 of 4 completions lack <teaching>; 100% truncated at 8 tokens: "
      "raise --config.sampling.teach.max_completion_tokens, or run SFT first",
      "Nothing was learnt: no step updated the parameters.",
    ),
    written={
      "untrained/export/README.md": (
        "> **Warning:** no training step updated these weights",
      )
    },
  ),
  # The smoke run writes its world; the reward is that of docs/rewards.md.
  "smoke_with_own_reward": _Command(
    "train_grpo",
    "--config=rlvr:smoke --workdir=own --reward_fn=reward.py:brevity=0.5 "
    "--config.batch.num_questions=4 --config.batch.per_device=4 "
    "--config.evaluation.num_questions=4 --config.loop.num_steps=1",
    shown=(
      "Step 1: sampling answers ...",
      "Step 1: computing rewards ...",
      "Step 1: compiling and running the update ...",
      "step 1/1 loss=",
      " rewards/length=-",
      "Finished: loss=",
    ),
    written={
      "own/metrics.jsonl": (
        '"grad_norm": ',
        '"rewards/reward.py:brevity": ',
        '"memory/host_gb": ',
        '"memory/host_peak_gb": ',
        '"eval/accuracy": ',
      ),
      "own/export/model.safetensors": (),
    },
  ),
  # Settings can be found.
  "help": _Command(
    "train_sft",
    "--help",
    shown=(
      "python -m scripts.train_sft --config=configs/run/teacher_sft.py",
      "--config.batch.size=16 Rows in a step.",
      "--show_samples=VALUE",
    ),
  ),
  "origins": _Command(
    "train_grpo",
    "--config=teacher_rcl:smoke --config.loop.num_steps=7 --print_config",
    shown=(
      "loop.num_steps 7 flag # Steps",
      "loop.log_every 5 :smoke # Steps",
      "batch.num_iterations 1 recipe # Passes",
      "mesh.data 1 default # ",
    ),
  ),
  "names_of_others": _Command(
    "train_grpo",
    "--config=teacher_rcl --config.optimizer.lr=1e-6 --num_generations=8",
    code=2,
    shown=(
      "--config.optimizer.lr: did you mean --config.schedule.learning_rate?",
      "--config.sampling.teach.group_size",
    ),
  ),
  # Ordinary mistakes are explained.
  "no_gpu": _Command(
    "train_sft",
    "--config=teacher_sft:smoke --workdir=no_gpu",
    code=2,
    shown=(
      "JAX cannot use the requested platform.",
      "where: JAX_PLATFORMS=cuda",
      "fix : Run unset JAX_PLATFORMS",
    ),
    environment={"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""},
  ),
  "wrong_script": _Command(
    "train_gkd",
    "--config=teacher_sft --workdir=wrong_script",
    code=2,
    shown=("Run python -m scripts.train_sft with the same flags.",),
  ),
  "workdir_for_its_export": _Command(
    "evaluate",
    f"--config=answer_eval --workdir=wrong_model --config.model.path=sft "
    f"{_EXAM}",
    code=5,
    shown=("sft/export?",),
    after=("sft",),
  ),
  # Sixty rows of a table train a base model with the defaults.
  "sft": _Command(
    "train_sft",
    f"--config=teacher_sft --workdir=sft --config.model.path=base {_CHATML} "
    f"{_EXAM} --config.num_epochs=2 --config.model.remat=none",
    shown=(
      "Read 60 rows of exam.csv in format default (question: Task, ",
      "Sample of exam.csv:2:",
      "0 + 0?<|im_end|> <|im_start|>assistant [[0<|im_end|>]]",
      "Packed 57 conversations into 3 rows of 512",
      "There are 3 rows for batches of batch.size=16",
      "step 2/2 loss=",
      "Finished: loss=",
    ),
  ),
  "verify": _Command(
    "convert",
    "verify sft sft/export",
    shown=(
      "All tensors of sft and sft/export are equal, bit for bit (bfloat16).",
    ),
    after=("sft",),
  ),
  # The export answers with the template that it was trained with.
  "evaluation": _Command(
    "evaluate",
    f"--config=answer_eval:smoke --workdir=evaluation {_EXAM} "
    "--config.world.directory= --config.model.path=sft/export "
    "--config.data.max_rows=4 --config.num_bootstrap=20 "
    "--config.sampling.teach.max_completion_tokens=8",
    shown=("| who answers | accuracy [95 %] |", "| model | 0."),
    written={"evaluation/summary.json": ('"accuracy": ',)},
    after=("sft",),
  ),
  "report": _Command(
    "report",
    "sft evaluation",
    shown=(
      "| metric | first | last |",
      "| loss | ",
      "Steps 1 to 2, ",
      "The trained model: sft/export",
      "| who answers | accuracy [95 %] |",
      "| model | 0.",
    ),
    after=("sft", "evaluation"),
  ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Returns a folder with a base model, data and a reward."""
  folder = tmp_path_factory.mktemp("hour")
  tiny.write_talker(
    folder / "base", num_hidden_layers=1, max_position_embeddings=512
  )
  (folder / "base/chat_template.jinja").unlink()
  fakes.write_tokenizer(folder / "tokenizer")
  page = (processes.ROOT / "docs/rewards.md").read_text()
  (code,) = re.findall(r"(?s)```python\n(.+?)```", page)
  (folder / "reward.py").write_text(code)
  _write_data(folder)
  return folder


def _write_data(folder):
  """Writes files of everyday formats."""
  lines = ["Task,Result", *(f"{i} + {i}?,{2 * i}" for i in range(60))]
  (folder / "exam.csv").write_text("\n".join(lines))
  alpaca = {"instruction": "Add.", "input": "2, 2", "output": "4"}
  (folder / "alpaca.json").write_text(json.dumps([alpaca]))
  (folder / "pairs.tsv").write_text("prompt\tcompletion\n2 + 3?\t5\n")
  chat = [("human", "2 + 4?"), ("gpt", "6")]
  row = {"conversations": [{"from": who, "value": text} for who, text in chat]}
  with gzip.open(folder / "chats.jsonl.gz", "wt") as file:
    file.write(json.dumps(row))
  turns = [("user", "2 + 5?"), ("assistant", "7")]
  row = {"messages": [{"role": who, "content": text} for who, text in turns]}
  (folder / "turns.jsonl").write_text(json.dumps(row))
  row = {"text": "Two and two is four."}
  (folder / "text.jsonl").write_text(json.dumps(row))
  row = {"question": "2 + 6?", "answer": "8"}
  (folder / "exam.jsonl").write_text(json.dumps(row))


@pytest.fixture(scope="module")
def run(folder):
  """Returns a function that runs a command once, after those it needs."""

  @functools.cache
  def run(name):
    command = _COMMANDS[name]
    for earlier in command.after:
      run(earlier)
    job = processes.Job(
      command.script,
      command.words.split(),
      environment={**processes.ENVIRONMENT, **command.environment},
      prepare=functools.partial(_prepare, folder),
    )
    return processes.end(job)

  return run


def _prepare(folder):
  """Enters the folder, in the job."""
  os.chdir(folder)
  # JAX has read the variable before the job was forked.
  jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


@pytest.mark.slow
@pytest.mark.parametrize("name", _COMMANDS)
def test_a_command_has_its_expected_outcome(run, folder, name):
  command = _COMMANDS[name]
  code, text = run(name)
  assert code == command.code, text
  assert "Traceback" not in text
  spaced = " ".join(text.split())
  assert [shown for shown in command.shown if shown not in spaced] == [], text
  for path, parts in command.written.items():
    written = (folder / path).read_bytes()
    assert [part for part in parts if part.encode() not in written] == []


@pytest.mark.slow
def test_the_trained_model_is_served_to_people(run, folder):
  run("sft")
  server = processes.Server("policy", folder / "sft/export")
  try:
    server.wait()
    with httpx2.Client(base_url=server.url, timeout=60.0) as client:
      body = {"prompts": [{"text": "1 + 1?"}], "max_tokens": 4}
      reply = client.post("/generate", json=body)
      page = client.get("/docs").text
  finally:
    server.stop()
  assert reply.status_code == 200, reply.text
  (((completion,),),) = [reply.json()["completions"]]
  assert len(completion["token_ids"]) in range(1, 5)
  assert completion["text"]
  assert "<code>max_tokens</code>" in page
  assert not re.findall(r"<script|<link|src=|url\(|https://", page)
