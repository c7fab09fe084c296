# SPDX-License-Identifier: Apache-2.0
"""Splits a model's parameters into trained and frozen ones."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from atlas_jax import errors, sharding
from atlas_jax.models import decoder, lora, quantized


@dataclasses.dataclass(frozen=True)
class Policy:
  """A model with its frozen parameters.

  The trained parameters are an argument of each method, since every update
  replaces them.

  Attributes:
    model: the model that `all_params` are for, including adapters.
    base: the model without adapters, for `merged_params` and `frozen`.
    frozen: the base's parameters if adapters are trained, else empty. Its
      kernels may be quantized.
    adapters: the adapters' settings; None if all parameters are trained.
  """

  model: decoder.Model
  base: decoder.Model
  frozen: decoder.Params
  adapters: lora.Lora | None

  def all_params(self, trained: decoder.Params) -> decoder.Params:
    """Returns all parameters of `model`, without copying."""
    return lora.join(self.frozen, trained)

  def merged_params(self, trained: decoder.Params) -> decoder.Params:
    """Returns parameters of `base` with the adapters merged in.

    If the frozen kernels are quantized, the result is in the model's dtype.
    """
    if self.adapters is None:
      return trained
    kind, scale = quantized.kind_of(self.frozen), self.adapters.scale
    dtype = self.base.dtype if kind else None
    merged = _merge(self.frozen, trained, scale=scale, dtype=dtype)
    return jax.device_put(merged, quantized.places(self.frozen))

  def identity(self) -> dict[str, str]:
    """Returns what a checkpoint of trained parameters must match."""
    config = self.base.config
    model = {
      f"model.{field.name}": str(getattr(config, field.name))
      for field in dataclasses.fields(config)
      if field.compare
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
  """Returns a policy in which all parameters are trained."""
  return Policy(model, model, {}, None)


def create(
  model: decoder.Model,
  params: decoder.Params,
  *,
  adapters: lora.Lora,
  mesh: jax.sharding.Mesh,
  key: jax.Array,
) -> tuple[Policy, decoder.Params]:
  """Creates a policy and its initial trained parameters.

  Args:
    model: the model without adapters.
    params: its parameters.
    adapters: the adapters' settings; rank 0 trains all parameters instead.
    mesh: mesh of the parameters.
    key: PRNG key of the adapters' initialization.

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
  """Splits parameters into frozen and trained ones, without computing anything.

  Args:
    model: the model without adapters.
    params: its parameters, or `jax.ShapeDtypeStruct`s of them.
    adapters: the adapters' settings; rank 0 trains all parameters instead.

  Returns:
    The policy, and the trained parameters as `jax.ShapeDtypeStruct`s.

  Raises:
    errors.ConfigError: see `lora.adapt` and `check_kept`.
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
  """Checks that quantized parameters are used with adapters and remat.

  Args:
    param_dtype: dtype of the policy's parameters; float dtypes always pass.
    rank: rank of the adapters.
    remat: remat setting of the policy; see `decoder.build`.

  Raises:
    errors.ConfigError: if parameters are quantized and the rank is 0 or remat
      is "none".
  """
  if param_dtype not in quantized.KINDS:
    return
  if not rank:
    raise errors.ConfigError(
      f"Parameters stored as {param_dtype} cannot be trained.",
      where=f"--config.model.param_dtype={param_dtype}",
      why="Rounding would discard updates. Adapters over them can be trained, "
      "but --config.lora.rank is 0.",
      fix="Set --config.lora.rank=16, for example, or "
      "--config.model.param_dtype=float32.",
    )
  if remat == "none":
    raise errors.ConfigError(
      f"param_dtype={param_dtype} does not support remat=none.",
      where="--config.model.remat=none",
      why="Without remat, the dequantized kernels of all layers are stored for "
      "the backward pass.",
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
  """Merges adapters into the base; `dtype` is None unless it is quantized.

  Unmodified parameters are not copied.
  """
  if dtype is None:
    return lora.merge(frozen, trained, scale)
  # Dequantized to float32, and rounded once, after adding the adapters.
  restored = quantized.restore(frozen, jnp.dtype(jnp.float32))
  merged = lora.merge(restored, trained, scale)
  return jax.tree.map(lambda leaf: leaf.astype(dtype), merged)
