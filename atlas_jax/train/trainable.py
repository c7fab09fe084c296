# SPDX-License-Identifier: Apache-2.0
"""What of a model is trained: all of it, or adapters over what stays."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from atlas_jax import errors, sharding
from atlas_jax.models import decoder, lora, quantized


@dataclasses.dataclass(frozen=True)
class Policy:
  """A model, split into what is trained and what is not.

  What is trained is an argument throughout, since every update replaces it.

  Attributes:
    model: of `whole` parameters.
    base: of `merged` parameters, and of `frozen` ones.
    frozen: the base's parameters where adapters are trained, else empty. Its
      kernels may be kept in few bits.
    adapters: what they are; None where all parameters are trained.
  """

  model: decoder.Model
  base: decoder.Model
  frozen: decoder.Params
  adapters: lora.Lora | None

  def all_params(self, trained: decoder.Params) -> decoder.Params:
    """Gives all parameters, of what a step has trained; copies nothing."""
    return lora.join(self.frozen, trained)

  def merged_params(self, trained: decoder.Params) -> decoder.Params:
    """Gives the parameters of a model without adapters that says the same.

    Of kernels that are kept in few bits they are in the model's dtype.
    """
    if self.adapters is None:
      return trained
    kind, scale = quantized.kind_of(self.frozen), self.adapters.scale
    dtype = self.base.dtype if kind else None
    merged = _merge(self.frozen, trained, scale=scale, dtype=dtype)
    return jax.device_put(merged, quantized.places(self.frozen))

  def identity(self) -> dict[str, str]:
    """Names what a checkpoint of the trained part belongs to."""
    config = self.base.config
    model = {
      f"model.{field.name}": str(getattr(config, field.name))
      for field in dataclasses.fields(config)
    }
    if self.adapters is None:
      return model
    sums = jax.jit(lora.checksums)(self.frozen)
    kind = quantized.kind_of(self.frozen)
    return {
      **model,
      "base": lora.fingerprint(sums),
      **({"base.kept_as": kind} if kind else {}),
      "lora.alpha": str(self.adapters.alpha),
    }


def full_policy(model: decoder.Model) -> Policy:
  """Gives the policy all of which is trained."""
  return Policy(model, model, {}, None)


def create(
  model: decoder.Model,
  params: decoder.Params,
  *,
  adapters: lora.Lora,
  mesh: jax.sharding.Mesh,
  key: jax.Array,
) -> tuple[Policy, decoder.Params]:
  """Splits a model into a policy and what of it is trained.

  Args:
    model: without adapters.
    params: its own.
    adapters: of rank 0 to train the parameters themselves.
    mesh: where the parameters are.
    key: decides where adapters start.

  Raises:
    errors.ConfigError: see `lora.adapt`.
  """
  policy, abstract = split(model, params, adapters)
  if policy.adapters is None:
    return policy, params
  trained = jax.jit(
    functools.partial(lora.init, abstract_adapters=abstract),
    out_shardings=sharding.of_params(mesh, abstract),
  )(key)
  return policy, trained


def split(
  model: decoder.Model, params: decoder.Params, adapters: lora.Lora
) -> tuple[Policy, decoder.Params]:
  """Tells what of a model is trained; computes nothing.

  Args:
    model: without adapters.
    params: its own, or what describes them.
    adapters: of rank 0 to train the parameters themselves.

  Returns:
    The policy, and the trained parameters as `jax.ShapeDtypeStruct`.

  Raises:
    errors.ConfigError: see `lora.adapt`; also if what is kept in few bits would
      be trained, or restored for all layers at once.
  """
  check_kept(
    quantized.kind_of(params) or "", rank=adapters.rank, remat=model.remat
  )
  if not adapters.rank:
    return full_policy(model), model.abstract_params
  adapted = lora.adapt(model, adapters)
  policy = Policy(adapted, model, params, adapters)
  return policy, lora.only(adapted.abstract_params)


def check_kept(param_dtype: str, *, rank: int, remat: str) -> None:
  """Refuses to train what is kept in few bits, or to keep it as floats too.

  Args:
    param_dtype: of the policy's parameters; of floats there is nothing to say.
    rank: of the adapters.
    remat: of the policy; see `decoder.build`.

  Raises:
    errors.ConfigError: naming what to set.
  """
  if param_dtype not in quantized.KINDS:
    return
  if not rank:
    raise errors.ConfigError(
      f"Parameters kept as {param_dtype} cannot be trained.",
      where=f"--config.model.param_dtype={param_dtype}",
      why="An update would be lost in rounding. Adapters can be trained beside "
      "them, and --config.lora.rank is 0.",
      fix="Set --config.lora.rank=16, for example, or "
      "--config.model.param_dtype=float32.",
    )
  if remat == "none":
    raise errors.ConfigError(
      f"A base kept as {param_dtype} would be restored for all layers at once.",
      where="--config.model.remat=none",
      why="It keeps what a layer computed with for the backward pass: whole "
      "kernels.",
      fix="Set --config.model.remat=dots, or block.",
    )


@functools.partial(jax.jit, static_argnames=("scale", "dtype"))
def _merge(
  frozen: decoder.Params,
  trained: decoder.Params,
  *,
  scale: float,
  dtype: jnp.dtype | None,
) -> decoder.Params:
  """Merges adapters; of a base that must be restored first, into `dtype`.

  What comes out as it went in is not copied.
  """
  if dtype is None:
    return lora.merge(frozen, trained, scale)
  # Rounded once: after what the adapters add.
  restored = quantized.restore(frozen, jnp.dtype(jnp.float32))
  merged = lora.merge(restored, trained, scale)
  return jax.tree.map(lambda leaf: leaf.astype(dtype), merged)
