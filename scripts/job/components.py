# SPDX-License-Identifier: Apache-2.0
"""Starts a job and opens its parts: models, samplers, rewards, writers."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import json
import pathlib
from typing import Any

from absl import logging
import jax

from atlas_jax import chat, distributed, errors, sharding, types
from atlas_jax.models import decoder, kernel_check, kernels, lora
from atlas_jax.rewards import combine, custom, grading, rlt, shared
from atlas_jax.teaching import protocol, roles, single_model, templates
from atlas_jax.teaching import shared as shared_protocol
from atlas_jax.train import optimizer as train_optimizer
from atlas_jax.train import score, train_state, trainable
from atlas_jax.train.telemetry import sinks, writer
from conversion import load, peft_adapters, process_group
from rollout import sampler, wire
from rollout.remote import shared_sampler
from scripts import small_world
from scripts.job import arguments, preemption, tokenizers, workdirs


@dataclasses.dataclass(frozen=True)
class OpenModel:
  """An opened model directory; `params` is empty if only servers need them.

  `name` is the path or Hub id that the user gave. `chat_template` is that of
  exports; empty for the directory's.
  """

  name: str
  directory: pathlib.Path
  model: decoder.Model
  params: decoder.Params
  tokenizer: chat.Tokenizer
  chat_template: str = ""


@contextlib.contextmanager
def start(
  workdir: pathlib.Path,
  config: types.Config,
) -> Iterator[Callable[[], bool]]:
  """Locks the workdir for this run and listens for signals.

  Process 0 holds the lock for all processes, which must agree on the workdir
  and the config. The config is written to `config.json`. If it names a small
  world that does not exist yet, that is created first.

  Yields:
    A function that returns whether a signal asked the run to stop.

  Raises:
    errors.ConfigError: if the workdir is unusable or in use, `data.path` is not
      set, parameters would be trained in a dtype that loses updates, or
      processes disagree.
    errors.OutOfMemoryError: in place of XLA's error, with suggestions.
  """
  arguments.check_data(config)
  if "lora" in config:  # Fails before a large model is loaded.
    trainable.check_kept(
      config.model.param_dtype,
      rank=config.lora.rank,
      remat=config.model.remat,
    )
    trained = () if config.lora.rank else (config.model.param_dtype,)
    train_optimizer.check_rounding(config.optimizer.rounding, trained)
  with contextlib.ExitStack() as held, _explained_out_of_memory():
    if distributed.is_first():
      held.enter_context(workdirs.lock(workdir))
      workdirs.write_config(workdir, config)
      if config.world.directory:
        small_world.ensure(**config.world)
    distributed.wait("workdir")
    # Every process must see the files that process 0 wrote.
    distributed.agree({**workdirs.facts(workdir), **workdirs.flat(config)})
    logging.info("Devices: %s", jax.devices())
    with preemption.listen() as should_stop:
      yield should_stop


@contextlib.contextmanager
def _explained_out_of_memory() -> Iterator[None]:
  """Replaces out-of-memory errors of XLA and the host by advice."""
  try:
    yield
  except (jax.errors.JaxRuntimeError, MemoryError) as error:
    is_host = isinstance(error, MemoryError)
    if not is_host and "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise errors.OutOfMemoryError(
      f"The {'host' if is_host else 'device'} is out of memory.",
      where=_memory_in_use(),
      why=str(error).partition("\n")[0] or "An allocation failed.",
      fix="Use a smaller batch or more microbatches (--config.batch), more "
      "rematerialization (--config.model.remat) or more devices "
      "(--config.mesh). --plan lists the bytes of each part. The last "
      "checkpoint is kept.",
    ) from error


def _memory_in_use() -> str:
  """Describes peak memory per device; CPU devices report none."""
  stats = [(d, d.memory_stats() or {}) for d in jax.local_devices()]
  described = [
    f"{device}: peak {s['peak_bytes_in_use'] / 1e9:.2f} GB of "
    f"{s['bytes_limit'] / 1e9:.2f} GB"
    for device, s in stats
    if "bytes_limit" in s and "peak_bytes_in_use" in s
  ]
  return "; ".join(described) or "this process"


def open_model(  # noqa: PLR0913 - the keys of a model section.
  mesh: jax.sharding.Mesh,
  *,
  path: str,
  dtype: str,
  param_dtype: str,
  attention: kernels.Backend,
  remat: decoder.Remat,
  unroll: int,
  with_params: bool = True,
  ignore_fields: Collection[str] = (),
  chat_template: str = "",
  chat_template_kwargs: str = "",
) -> OpenModel:
  """Loads a Hugging Face directory, or an id on the Hub, onto the mesh.

  Args:
    mesh: the parameters are sharded over it.
    path: a directory, or `owner/name` on the Hub.
    dtype: of activations.
    param_dtype: of parameters; float32 for trained masters, int8 or nf4 for a
      frozen base: see `quantized`.
    attention: see `decoder.build`.
    remat: see `decoder.build`.
    unroll: see `decoder.build`.
    with_params: whether to load parameters; a student on servers needs none.
    ignore_fields: fields of config.json that are treated as absent.
    chat_template: see `chat.load_tokenizer`.
    chat_template_kwargs: see `tokenizers.open_tokenizer`.

  Raises:
    errors.AtlasError: if the model directory or its tokenizer is unusable.
  """
  if remat == "offload":
    train_state.check_host_memory(mesh, where="--config.model.remat=offload")
  directory = load.resolve(path)
  config, _ = load.read_config(directory, ignore_fields=ignore_fields)
  model = decoder.build(
    config,
    dtype=dtype,
    attention=attention,
    remat=remat,
    unroll=unroll,
    layout=sharding.of_activations(mesh),
  )
  tokenizer = tokenizers.open_tokenizer(
    directory,
    chat_template=chat_template,
    chat_template_kwargs=chat_template_kwargs,
  )
  chat.check_vocabulary(tokenizer, config.vocab_size, directory)
  template = tokenizer.chat_template
  if not (chat_template or chat_template_kwargs) or isinstance(template, dict):
    template = ""  # Exports copy the directory's.
  if not with_params:
    return OpenModel(path, directory, model, {}, tokenizer, template)
  kernel_check.require(model.kernel, config, model.dtype)
  shardings = sharding.of_params(mesh, load.describe(model, param_dtype))
  params = load.load(
    directory, model, param_dtype=param_dtype, shardings=shardings
  )
  return OpenModel(path, directory, model, params, tokenizer, template)


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
  """Splits a model into frozen and trained parameters.

  Args:
    opened: the model.
    mesh: over which its parameters are sharded.
    seed: of the initial adapters.
    path: a PEFT directory with initial adapters; empty for random ones.
    rank: see `lora.Lora`.
    alpha: see `lora.Lora`.
    targets: see `lora.Lora`.

  Raises:
    errors.ConfigError: if the model does not support these adapters, or those
      at `path` have other settings.
    errors.CheckpointError: if those at `path` are unusable.
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
  """Returns the model that the policy equals before its first step.

  Adapters loaded from a PEFT directory are merged into the base. New adapters,
  where the path is empty, are zero and change nothing.
  """
  if not adapters_path:
    return opened
  return dataclasses.replace(opened, params=policy.merged_params(trained))


@contextlib.contextmanager
def open_protocol(
  policy: OpenModel,
  student: OpenModel,
  mesh: jax.sharding.Mesh,
  config: types.Config,
) -> Iterator[protocol.Protocol]:
  """Opens the teaching protocol between a policy and a student.

  It reads the sections `rollout`, `sampler`, `roles`, `templates` and
  `sampling`, and `seed` for the baseline answers.

  Raises:
    errors.AtlasError: if the rollout servers are unusable.
  """
  params: dict[str, Any] = {
    f"{name}_params": types.SamplingParams(**section, seed=config.seed)
    for name, section in config.sampling.items()
  }
  with (
    open_sampler("policy", policy, mesh, config) as of_policy,
    open_sampler("student", student, mesh, config) as of_student,
  ):
    create: Callable[..., protocol.Protocol] = protocol.Protocol
    if isinstance(of_policy, shared_sampler.SharedSampler) and isinstance(
      of_student, shared_sampler.SharedSampler
    ):
      create = functools.partial(
        shared_protocol.SharedProtocol,
        samplers=(of_policy.inner, of_student.inner),
        from_first=distributed.FirstProcessBroadcast("protocol"),
      )
    yield create(
      roles.Role(of_policy, policy.tokenizer, **config.roles.policy),
      roles.Role(of_student, student.tokenizer, **config.roles.student),
      templates.Templates(**config.templates),
      **params,
    )


@contextlib.contextmanager
def open_single_model(
  policy: OpenModel,
  mesh: jax.sharding.Mesh,
  config: types.Config,
) -> Iterator[single_model.SingleModelRollouts]:
  """Opens rollouts of a policy that answers questions by itself.

  It reads the sections `rollout`, `sampler`, `roles` and `sampling`, and the
  prompt `template`.

  Raises:
    errors.AtlasError: if the rollout servers are unusable.
  """
  params = types.SamplingParams(**config.sampling.teach, seed=config.seed)
  with open_sampler("policy", policy, mesh, config) as of_policy:
    yield single_model.SingleModelRollouts(
      roles.Role(of_policy, policy.tokenizer, **config.roles.policy),
      config.template,
      answer_params=params,
    )


def evaluation_rollouts(
  training: protocol.Protocol | single_model.SingleModelRollouts,
  config: types.Config,
) -> protocol.Rollouts:
  """Returns rollouts with the group sizes of the section `evaluation`.

  They use the samplers of training. Their baseline answers are cached, but not
  in checkpoints: a resumed run samples the same ones, since they depend only on
  the seed, the question and the student's weights.
  """

  def sized(
    params: types.SamplingParams, group_size: int
  ) -> types.SamplingParams:
    return dataclasses.replace(params, group_size=group_size)

  evaluation = config.evaluation
  if isinstance(training, single_model.SingleModelRollouts):
    params = types.SamplingParams(**config.sampling.teach, seed=config.seed)
    return single_model.SingleModelRollouts(
      training.policy,
      config.template,
      answer_params=sized(params, evaluation.num_answers),
    )
  return protocol.Protocol(
    training.policy,
    training.student,
    training.templates,
    probe_params=training.probe_params,
    teach_params=sized(training.teach_params, evaluation.num_teachings),
    solve_params=sized(training.solve_params, evaluation.num_answers),
    baseline_params=sized(training.baseline_params, evaluation.num_baselines),
  )


def open_sampler(
  role: wire.Role,
  opened: OpenModel,
  mesh: jax.sharding.Mesh,
  config: types.Config,
) -> contextlib.AbstractContextManager[types.Sampler]:
  """Opens a model's sampler from the sections `rollout` and `sampler`.

  Raises:
    errors.AtlasError: if the rollout servers are unusable.
  """
  return sampler.open_sampler(
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
  )


def share() -> process_group.ProcessShare:
  """Returns this process's share in work that processes divide."""
  return process_group.ProcessShare(
    jax.process_index(), jax.process_count(), distributed.exchange
  )


def open_writer(
  workdir: pathlib.Path,
  config: types.Config,
) -> writer.Writer:
  """Opens the outputs of a run's metrics: files, console and trackers.

  Raises:
    errors.ConfigError: if a requested tracker is not available.
  """
  if not distributed.is_first():
    return writer.Silent(workdir, ())
  resolved = json.loads(config.to_json_best_effort())
  return writer.Writer(
    workdir, sinks.open_sinks(workdir, resolved, **config.report)
  )


def open_grader(
  settings: types.Config,
) -> contextlib.AbstractContextManager[grading.Grader]:
  """Opens the grader; process 0 asks math-verify."""
  return grading.open_grader(
    **settings, from_first=distributed.FirstProcessBroadcast("grading")
  )


@contextlib.contextmanager
def open_reward(
  reader: rlt.Student | None,
  grader: grading.Grader,
  functions: custom.Functions,
  config: types.Config,
) -> Iterator[types.RewardFn]:
  """Opens the reward of the section `reward` and of the user's functions.

  Process 0 computes the rewards, using the devices of all processes.

  Raises:
    errors.ConfigError: see `combine.open_reward`.
  """

  def open_own(
    weights: Mapping[str, float], functions: custom.Functions
  ) -> contextlib.AbstractContextManager[types.RewardFn]:
    return combine.open_reward(
      **{**config.reward, "weights": weights, "math_verify": grader.verify},
      functions=functions,
      student=reader,
      max_tokens=config.sampling.teach.max_completion_tokens,
    )

  weights = config.reward.weights.to_dict()
  with contextlib.ExitStack() as opened:
    own = None
    if distributed.is_first():
      own = opened.enter_context(open_own(weights, functions))
    elif weights["rlt"]:  # Every process takes part in scoring.
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
  config: types.Config,
) -> rlt.Student | None:
  """Opens a scorer of solutions by the student, if its parameters are here.

  Raises:
    errors.ConfigError: if the reward `rlt` is used and student and policy have
      different tokenizers.
  """
  same = policy.tokenizer.get_vocab() == student.tokenizer.get_vocab()
  if config.reward.weights.rlt and not same:
    raise errors.ConfigError(
      "The reward rlt requires policy and student to share a tokenizer.",
      where=f"{policy.directory}, {student.directory}",
      why="It compares log-probabilities of the same tokens.",
      fix="Use models of one family, or set --config.reward.weights.rlt=0.",
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
