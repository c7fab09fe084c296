# SPDX-License-Identifier: Apache-2.0
"""Process start, and the pieces that every main puts together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import subprocess
import sys
from typing import Any

from absl import logging
import jax

from atlas_jax import chat, distributed, errors, sharding, types
from atlas_jax.models import decoder, kernel_check, kernels, lora
from atlas_jax.rewards import combine, custom, rlt, shared
from atlas_jax.teaching import protocol, single_model, templates
from atlas_jax.train import score, train_state, trainable
from atlas_jax.train.telemetry import sinks, writer
from conversion import load, peft_adapters, process_group
from rollout import sampler, wire
from scripts.job import preemption, workdirs


@dataclasses.dataclass(frozen=True)
class OpenModel:
  """A model directory, opened; `params` is empty if others hold them.

  `name` is what it was asked for by: a path, or an id on the Hub.
  """

  name: str
  directory: pathlib.Path
  model: decoder.Model
  params: decoder.Params
  tokenizer: chat.Tokenizer


@contextlib.contextmanager
def start(
  workdir: pathlib.Path,
  config: Any,  # Any: a ConfigDict, whose values have no static type.
) -> Iterator[Callable[[], bool]]:
  """Takes the workdir for this run alone, and listens for signals.

  Of several processes the first holds it for all, once they agree on it and on
  the config, which is written to `config.json`. If the config names a small
  world that does not exist yet, it is made first.

  Yields:
    A function that tells whether a signal asked the run to stop.

  Raises:
    errors.ConfigError: if the workdir cannot be used, another run uses it, the
      config names no data or would train what is kept in few bits, or that of
      another process differs.
    errors.OutOfMemoryError: with advice, in place of XLA's error.
  """
  if config.data.path is None:
    raise errors.ConfigError(
      "The config names no data.",
      where="--config.data.path",
      why="This recipe leaves it to you.",
      fix="Set --config.data.path to a file, a folder or a Hub dataset.",
    )
  if "lora" in config:  # Before a large model is read for nothing.
    trainable.check_kept(
      config.model.param_dtype,
      rank=config.lora.rank,
      remat=config.model.remat,
    )
  with contextlib.ExitStack() as held, _out_of_memory_told():
    if distributed.is_first():
      held.enter_context(workdirs.lock(workdir))
      workdirs.write_config(workdir, config)
      if config.world.directory:
        ensure_world(**config.world)
    distributed.wait("workdir")
    # What the first process wrote, all must see.
    distributed.agree({**workdirs.facts(workdir), **workdirs.flat(config)})
    logging.info("Devices: %s", jax.devices())
    with preemption.listen() as should_stop:
      yield should_stop


@contextlib.contextmanager
def _out_of_memory_told() -> Iterator[None]:
  """Turns what XLA says of memory into advice."""
  try:
    yield
  except (jax.errors.JaxRuntimeError, MemoryError) as error:
    is_host = isinstance(error, MemoryError)
    if not is_host and "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise errors.OutOfMemoryError(
      f"The {'host' if is_host else 'device'} is out of memory.",
      where=_memory_in_use(),
      why=str(error).partition("\n")[0] or "It could not be allocated.",
      fix="Make the batch smaller, or split it into more microbatches "
      "(--config.batch); recompute more (--config.model.remat); or split the "
      "model over more devices (--config.mesh); --plan tells what each part "
      "takes. The last checkpoint is kept.",
    ) from error


def _memory_in_use() -> str:
  """Tells what the devices say of themselves; those of a CPU say nothing."""
  stats = [(d, d.memory_stats() or {}) for d in jax.local_devices()]
  told = [
    f"{device}: {s['peak_bytes_in_use'] / 1e9:.2f} GB at its peak, of "
    f"{s['bytes_limit'] / 1e9:.2f} GB"
    for device, s in stats
    if "bytes_limit" in s and "peak_bytes_in_use" in s
  ]
  return "; ".join(told) or "this process"


def ensure_world(*, directory: str, with_teacher: bool) -> None:
  """Makes the small world in `directory`, unless it is there.

  Raises:
    errors.ConfigError: if it could not be made.
  """
  needed = ["world.json"] + ["teacher_run/export"] * with_teacher
  if all((pathlib.Path(directory) / name).exists() for name in needed):
    return
  logging.info("Making the small world in %s; a few minutes.", directory)
  command = [sys.executable, "-m", "scripts.make_world"]
  options = [f"--directory={directory}", f"--teacher={with_teacher}"]
  code = subprocess.run([*command, *options], check=False).returncode
  if code:
    raise errors.ConfigError(
      "The small world could not be made.",
      where=directory,
      why=f"scripts.make_world ended with code {code}; see above.",
      fix="Mend what it reports; what is done already is kept.",
    )


def open_model(
  mesh: jax.sharding.Mesh,
  *,
  path: str,
  dtype: str,
  param_dtype: str,
  attention: kernels.Backend,
  remat: decoder.Remat,
  unroll: int,
  with_params: bool = True,
) -> OpenModel:
  """Loads a Hugging Face directory, or an id on the Hub, onto the mesh.

  Args:
    mesh: where the parameters go.
    path: a directory, or `owner/name`.
    dtype: of activations.
    param_dtype: of parameters; float32 for masters that are trained, int8 or
      nf4 for a base that is not: see `quantized`.
    attention: see `decoder.build`.
    remat: see `decoder.build`.
    unroll: see `decoder.build`.
    with_params: whether to load any; a student on servers needs none here.

  Raises:
    errors.AtlasError: if the directory or the tokenizer cannot be used.
  """
  if remat == "offload":
    train_state.check_host_memory(mesh, where="--config.model.remat=offload")
  directory = load.resolve(path)
  config, _ = load.read_config(directory)
  model = decoder.build(
    config,
    dtype=dtype,
    attention=attention,
    remat=remat,
    unroll=unroll,
    layout=sharding.of_activations(mesh),
  )
  tokenizer = chat.load_tokenizer(directory)
  chat.check_vocabulary(tokenizer, config.vocab_size, directory)
  if not with_params:
    return OpenModel(path, directory, model, {}, tokenizer)
  kernel_check.require(model.kernel, config, model.dtype)
  shardings = sharding.of_params(mesh, load.describe(model, param_dtype))
  params = load.load(
    directory, model, param_dtype=param_dtype, shardings=shardings
  )
  return OpenModel(path, directory, model, params, tokenizer)


def open_policy(
  opened: OpenModel,
  mesh: jax.sharding.Mesh,
  *,
  seed: int,
  path: str,
  rank: int,
  alpha: float,
  targets: Sequence[str],
) -> tuple[trainable.Policy, decoder.Params]:
  """Splits a model into what stays and what is trained.

  Args:
    opened: the model.
    mesh: where its parameters are.
    seed: decides where adapters start.
    path: a PEFT directory to start from instead; empty for none.
    rank: see `lora.Lora`.
    alpha: see `lora.Lora`.
    targets: see `lora.Lora`.

  Raises:
    errors.ConfigError: if the model cannot have such adapters, or those at
      `path` are others.
    errors.CheckpointError: if they cannot be used.
  """
  adapters = lora.Lora(rank=rank, alpha=alpha, targets=targets)
  policy, trained = trainable.create(
    opened.model,
    opened.params,
    adapters=adapters,
    mesh=mesh,
    key=jax.random.key(seed),
  )
  if path:
    start = peft_adapters.load(pathlib.Path(path), opened.model, adapters)
    placed = jax.tree.map(lambda leaf: leaf.sharding, trained)
    trained = jax.device_put(start, placed)
  return policy, trained


def policy_at_start(
  opened: OpenModel,
  policy: trainable.Policy,
  trained: decoder.Params,
  *,
  adapters_path: str,
) -> OpenModel:
  """Gives the model that a policy is before its first step.

  Adapters from a PEFT directory are not in the base, so it is merged with them;
  new ones, where the path is empty, change nothing.
  """
  if not adapters_path:
    return opened
  return dataclasses.replace(opened, params=policy.merged_params(trained))


@contextlib.contextmanager
def open_protocol(
  policy: OpenModel,
  student: OpenModel,
  mesh: jax.sharding.Mesh,
  config: Any,  # Any: a ConfigDict, whose values have no static type.
) -> Iterator[protocol.Protocol]:
  """Lets a policy teach a student, as `config` says.

  Its sections are `rollout`, `sampler`, `templates` and `sampling`; `seed` is
  that of the baseline answers.

  Raises:
    errors.AtlasError: if rollout servers are asked for and cannot be used.
  """
  params = {
    f"{name}_params": types.SamplingParams(**section, seed=config.seed)
    for name, section in config.sampling.items()
  }
  with (
    open_role("policy", policy, mesh, config) as policy_role,
    open_role("student", student, mesh, config) as student_role,
  ):
    yield protocol.Protocol(
      policy_role,
      student_role,
      templates.Templates(**config.templates),
      **params,
    )


@contextlib.contextmanager
def open_single_model(
  policy: OpenModel,
  mesh: jax.sharding.Mesh,
  config: Any,  # Any: as in `open_protocol`.
) -> Iterator[single_model.SingleModelRollouts]:
  """Lets a policy answer by itself, as `config` says.

  Its sections are `rollout`, `sampler` and `sampling`; `template` asks.

  Raises:
    errors.AtlasError: if rollout servers are asked for and cannot be used.
  """
  params = types.SamplingParams(**config.sampling.teach, seed=config.seed)
  with open_role("policy", policy, mesh, config) as role:
    yield single_model.SingleModelRollouts(
      role, config.template, answer_params=params
    )


@contextlib.contextmanager
def open_role(
  role: wire.Role,
  opened: OpenModel,
  mesh: jax.sharding.Mesh,
  config: Any,  # Any: as in `open_protocol`.
) -> Iterator[protocol.Role]:
  """Opens a model's sampler, as the sections `rollout` and `sampler` say.

  Raises:
    errors.AtlasError: if rollout servers are asked for and cannot be used.
  """
  with sampler.open_sampler(
    role,
    sampler.Settings(**config.rollout),
    directory=opened.directory,
    model=opened.model,
    params=opened.params,
    tokenizer=opened.tokenizer,
    mesh=mesh,
    share=share(),
    from_first=distributed.FirstProcessBroadcast(role),
    **config.sampler,
  ) as its_sampler:
    yield protocol.Role(its_sampler, opened.tokenizer)


def share() -> process_group.ProcessShare:
  """Tells which of the processes that train as one this is."""
  return process_group.ProcessShare(
    jax.process_index(), jax.process_count(), distributed.exchange
  )


def open_writer(
  workdir: pathlib.Path,
  config: Any,  # Any: as in start.
) -> writer.Writer:
  """Opens what takes a run's metrics: files, console, and trackers.

  Raises:
    errors.ConfigError: if a tracker is asked for that cannot be had.
  """
  if not distributed.is_first():
    return writer.Silent(workdir, ())
  resolved = json.loads(config.to_json_best_effort())
  return writer.Writer(
    workdir, sinks.open_sinks(workdir, resolved, **config.report)
  )


@contextlib.contextmanager
def open_reward(
  reader: rlt.Student | None,
  functions: custom.Functions,
  config: Any,  # Any: as in `open_protocol`.
) -> Iterator[types.RewardFn]:
  """Opens the reward of the config's section, and of the user's functions.

  Of several processes the first one rewards, with the devices of all.

  Raises:
    errors.ConfigError: see `combine.open_reward`.
  """

  def open_own(
    weights: Mapping[str, float], functions: custom.Functions
  ) -> contextlib.AbstractContextManager[types.RewardFn]:
    return combine.open_reward(
      **{**config.reward, "weights": weights},
      functions=functions,
      student=reader,
      max_tokens=config.sampling.teach.max_completion_tokens,
    )

  weights = config.reward.weights.to_dict()
  with contextlib.ExitStack() as opened:
    own = None
    if distributed.is_first():
      own = opened.enter_context(open_own(weights, functions))
    elif weights["rlt"]:  # All devices score for it, and so all processes.
      others = dict.fromkeys(weights, 0.0) | {"rlt": 1.0}
      without = dataclasses.replace(functions, weights={})
      own = opened.enter_context(open_own(others, without))
    if own is None or jax.process_count() > 1:
      own = shared.shared(own, distributed.FirstProcessBroadcast("reward"))
    yield own


def open_student_scorer(
  policy: OpenModel,
  student: OpenModel,
  teaching: protocol.Protocol,
  mesh: jax.sharding.Mesh,
  config: Any,  # Any: as in `open_protocol`.
) -> rlt.Student | None:
  """Lets a student say how likely it finds a solution, if it is in here.

  Raises:
    errors.ConfigError: if the reward `rlt` is asked for and the student reads
      other tokens than the policy writes.
  """
  same = policy.tokenizer.get_vocab() == student.tokenizer.get_vocab()
  if config.reward.weights.rlt and not same:
    raise errors.ConfigError(
      "The reward rlt needs one tokenizer.",
      where=f"{policy.directory}, {student.directory}",
      why="It compares what policy and student think of the same tokens.",
      fix="Take models of one family, or set --config.reward.weights.rlt=0.",
    )
  if not student.params:
    return None
  scorer = score.Scorer(
    student.model,
    student.params,
    mesh=mesh,
    max_rows=config.sampler.max_rows,
    **config.logits,
  )
  return rlt.Student(scorer, student.tokenizer, teaching.baseline_prompt)


def fingerprint(opened: OpenModel) -> str:
  """Names the weights of a model directory by a digest of its files."""
  digest = hashlib.sha256()
  for path in sorted(opened.directory.glob("*.safetensors")):
    with path.open("rb") as file:
      digest.update(hashlib.file_digest(file, "sha256").digest())
  return digest.hexdigest()
