# SPDX-License-Identifier: Apache-2.0
"""Tests SFT: packing invariance, learning, resuming and adapters."""

import functools
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from atlas_jax import chat, errors, sharding, types
from atlas_jax.data import loader, packing, sets
from atlas_jax.models import lora
from atlas_jax.train import loop, sft, train_state, trainable
from atlas_jax.train.telemetry import writer
from configs import lora as adapters
from configs import optimizer as optimizers
from conversion import load
from tests import fakes, metric_names, tiny

_ROWS = [
  {"question": f"What is {i} + {i}?", "solution": f"It is {2 * i}."}
  for i in range(20)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  return fakes.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _write(tmp_path, rows=_ROWS, name="data.jsonl"):
  path = tmp_path / name
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def test_packing_changes_neither_loss_nor_gradient(tokenizer):
  conversations = [
    [
      {"role": "user", "content": "Say " + "hello " * i},
      {"role": "assistant", "content": "hello " * (i + 1)},
    ]
    for i in range(4)
  ]
  examples = [
    chat.tokenize(tokenizer, [types.Message(**turn) for turn in conversation])
    for conversation in conversations
  ]
  model = tiny.build("qwen2", vocab_size=len(tokenizer))
  params = tiny.params_of(model)
  loss_fn = functools.partial(
    sft.packed_loss,
    model,
    z_loss_coef=1e-3,
    chunk_tokens=16,
    router_aux_coef=0.0,
  )

  def of(layout):
    arrays = layout(examples, 128, too_long="error").arrays
    batch = {name: jnp.asarray(array) for name, array in arrays.items()}
    grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, (weight, _)), grads = grad_fn(params, batch)
    return len(arrays["token_ids"]), loss, weight, grads

  num_packed, loss, weight, grads = of(packing.pack)
  num_padded, *expected, expected_grads = of(packing.pad)
  assert (num_packed, num_padded) == (2, 4)
  assert weight == expected[1]
  np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    grads,
    expected_grads,
  )


def _config(**changes):
  config = ml_collections.ConfigDict(
    {
      "lora": adapters.get_config(),
      "num_epochs": 0,
      "batch": {"size": 8, "per_device": 1},
      "loss": {"z_loss_coef": 0.0, "chunk_tokens": 32},
      "experts": {"router_aux_coef": 0.0},
      "schedule": {
        "learning_rate": 0.02,
        "schedule": "cosine",
        "warmup_fraction": 0.1,
        "warmup_steps": 0,
        "decay_fraction": 0.0,
      },
      "optimizer": optimizers.get_config(),
      "loop": {
        "num_steps": 12,
        "log_every": 1,
        "eval_every": 6,
        "save_every": 6,
        "max_nonfinite": 1,
        "profile_steps": "",
        "watchdog_s": 0.0,
        "require_updates": False,
      },
      "offload": {"optimizer": False},
      "checkpoint": {
        "keep": 2,
        "max_failed": 2,
        "allow_changed": "",
        "best_metric": "eval/loss",
        "best_mode": "min",
        "load_best": False,
      },
    }
  )
  del config.lora.path  # Read only by `components.open_policy`.
  config.update_from_flattened_dict(changes)
  return config


_SHAPE = {
  "hidden_size": 24,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "num_hidden_layers": 1,
}


def _train(
  tokenizer,
  path,
  workdir,
  config,
  should_stop=lambda: False,
  *,
  seed=0,
  shape=_SHAPE,
  param_dtype="float32",
):
  mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
  size = len(tokenizer) + len(tokenizer) % 2
  shape = {**shape, "vocab_size": size}
  folder = workdir.parent / f"{workdir.name}-model-{seed}"
  if not folder.exists():
    tiny.write_checkpoint(folder, "qwen2", seed=seed, **shape)
  model = tiny.build("qwen2", remat="dots", **shape)
  described = load.describe(model, param_dtype)
  start = load.load(
    folder,
    model,
    param_dtype=param_dtype,
    shardings=sharding.of_params(mesh, described),
  )
  train_set, eval_set = sets.conversations(
    tokenizer,
    data=sets.Selection(path, "default", {}, (), max_rows=0, max_bad_rows=0),
    held_out=sets.HeldOut(path="", fraction=0.2),
    layout=sets.Layout(length=64, packed=True, too_long="error"),
    batch_size=config.batch.size,
    seed=0,
    workdir=workdir,
  )
  policy, params = trainable.create(
    model,
    start,
    adapters=lora.Lora(**config.lora),
    mesh=mesh,
    key=jax.random.key(3),
  )
  return sft.train(
    policy,
    params,
    train_set=train_set,
    eval_set=eval_set,
    mesh=mesh,
    config=config,
    run=loop.Run(workdir, writer.Writer(workdir, ()), should_stop=should_stop),
  )


@pytest.mark.slow
def test_sft_learns_and_resumes_only_with_the_same_data(
  tokenizer, tmp_path, monkeypatch
):
  rows_of_programs = tiny.record_rows(monkeypatch, sft)
  path = _write(tmp_path)
  config = _config()
  _train(tokenizer, path, tmp_path / "run", config)
  lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  losses = [row["loss"] for row in rows if "loss" in row]
  evaluated = [row["eval/loss"] for row in rows if "eval/loss" in row]
  assert len(losses) == 12
  assert losses[-1] < 0.7 * losses[0]
  assert evaluated[1] < evaluated[0]
  assert rows[0]["learning_rate"] == pytest.approx(0.02)
  metric_names.check("SFT", rows)
  # Evaluation and training have one row per device: four of the mesh's rows.
  assert set(rows_of_programs) == {4}

  other = _write(tmp_path, _ROWS[:-1], "other.jsonl")
  with pytest.raises(errors.CheckpointError, match="another data") as caught:
    _train(tokenizer, other, tmp_path / "run", config)
  assert caught.value.exit_code == 5


@pytest.mark.slow
def test_only_adapters_learn_and_they_resume_bit_for_bit(tokenizer, tmp_path):
  path = _write(tmp_path)
  config = _config(**{"lora.rank": 4, "lora.alpha": 8.0})
  straight = _train(tokenizer, path, tmp_path / "straight", config)
  lines = (tmp_path / "straight/metrics.jsonl").read_text().splitlines()
  losses = [json.loads(line).get("loss") for line in lines]
  losses = [loss for loss in losses if loss is not None]
  assert losses[-1] < losses[0]
  start = jax.device_get(lora.init(jax.random.key(3), straight))
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max() > 1e-3, straight, start)
  assert all(jax.tree.leaves(moved))

  stops = iter([False] * 5 + [True])
  with pytest.raises(errors.PreemptedError):
    _train(tokenizer, path, tmp_path / "run", config, lambda: next(stops))
  (about,) = (tmp_path / "run/checkpoints").glob("*/about.json")
  assert not [
    n for n in json.loads(about.read_text())["arrays"] if "kernel" in n
  ]
  resumed = _train(tokenizer, path, tmp_path / "run", config)
  jax.tree.map(np.testing.assert_array_equal, resumed, straight)

  with pytest.raises(errors.CheckpointError, match="another base"):
    _train(tokenizer, path, tmp_path / "run", config, seed=1)


@pytest.mark.slow
def test_adapters_learn_over_a_quantized_base_as_over_bfloat16(
  tokenizer, tmp_path
):
  path = _write(tmp_path)
  config = _config(**{"lora.rank": 4, "lora.alpha": 8.0})
  shape = {**tiny.blocks("qwen2"), "num_hidden_layers": 1}

  def train(param_dtype, workdir, *stop):
    return _train(
      tokenizer,
      path,
      tmp_path / workdir,
      config,
      *stop,
      shape=shape,
      param_dtype=param_dtype,
    )

  losses, trained = {}, {}
  for kind in ("bfloat16", "nf4"):
    trained[kind] = train(kind, kind)
    lines = (tmp_path / kind / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    losses[kind] = np.array([row["loss"] for row in rows if "loss" in row])
    assert losses[kind][-1] < 0.9 * losses[kind][0]
  np.testing.assert_allclose(losses["nf4"], losses["bfloat16"], rtol=0.25)

  stops = iter([False] * 5 + [True])
  with pytest.raises(errors.PreemptedError):
    train("nf4", "run", lambda: next(stops))
  (about,) = (tmp_path / "run/checkpoints").glob("*/about.json")
  held = json.loads(about.read_text())
  assert not [n for n in held["arrays"] if "nf4" in n or "kernel" in n]
  assert held["identity"]["base.kept_as"] == "nf4"
  resumed = train("nf4", "run")
  jax.tree.map(np.testing.assert_array_equal, resumed, trained["nf4"])
  with pytest.raises(errors.CheckpointError, match="another base"):
    train("int8", "run")


@pytest.mark.parametrize(
  ("num_rows", "num_microbatches", "used"),
  [(3, 8, 3), (3, 4, 3), (3, 2, None), (8, 8, None), (9, 8, None)],
)
def test_microbatches_without_rows_are_not_computed(
  num_rows, num_microbatches, used
):
  token_ids = np.ones((num_rows, 4), np.int32)
  data = loader.Loader(
    {"token_ids": token_ids},
    names=[""] * num_rows,
    mix=loader.Mix((num_rows,), (), 0),
    batch_size=8,
    remainder="drop",
    share=loader.WHOLE,
  )
  assert sft._num_used(data, 0, num_microbatches) == used
  # As `optimizer_step.accumulate` divides the rows.
  real = data.batch(0)["token_ids"].reshape(-1, num_microbatches, 4)
  has_rows = real.any(axis=(0, 2))
  assert has_rows[: used or num_microbatches].all()
  assert not has_rows[used or num_microbatches :].any()


def test_offload_without_host_memory_raises(tokenizer, tmp_path, monkeypatch):
  monkeypatch.setattr(train_state, "_HOST", "memory_of_nobody")
  config = _config(**{"offload.optimizer": True})
  with pytest.raises(errors.ConfigError, match="Offloading needs"):
    _train(tokenizer, _write(tmp_path), tmp_path / "run", config)


@pytest.mark.parametrize(("num_epochs", "num_steps"), [(0, 0), (2, 3)])
def test_exactly_one_of_num_epochs_and_num_steps_is_required(
  tokenizer, tmp_path, num_epochs, num_steps
):
  config = _config(**{"num_epochs": num_epochs, "loop.num_steps": num_steps})
  with pytest.raises(errors.ConfigError, match="num_epochs"):
    _train(tokenizer, _write(tmp_path), tmp_path / "run", config)
