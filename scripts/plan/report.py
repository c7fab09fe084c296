# SPDX-License-Identifier: Apache-2.0
"""Prints what a run needs and whether it fits, instead of running it (--plan).

  python -m scripts.train_sft --config=configs/run/teacher_sft.py \
    --workdir=results/sft --config.model.path=Qwen/Qwen3-8B --plan=8xH100

Uses no accelerator and creates no arrays; a directory with a config.json is
enough for the model. Docs: docs/plan.md.
"""

from collections.abc import Iterator, Mapping
import dataclasses
import math
import os
import re

from absl import flags
import jax

from atlas_jax import errors, types
from atlas_jax.train.telemetry import flops
from conversion import save
from scripts.job import arguments
from scripts.plan import checks as plan_checks
from scripts.plan import memory as plan_memory
from scripts.plan import sampling as plan_sampling
from scripts.plan import update_bytes

_PLAN = flags.DEFINE_string(
  "plan",
  "",
  "Devices to plan for, such as 8xH100 or 64x80GiB. Prints what the run needs "
  "of them, and exits.",
)
_MFU = flags.DEFINE_float(
  "plan_mfu",
  0.4,
  "Model FLOPs utilization that --plan assumes, as a fraction of peak FLOP/s.",
  lower_bound=0.01,
  upper_bound=1.0,
)

# JAX's `device_kind` (see `flops.peak`), the GiB that JAX can use, and the
# memory bandwidth in 1e12 bytes per second, from the same data sheets.
_DEVICES: Mapping[str, tuple[str, float, float]] = {
  "B200": ("NVIDIA B200", 178.0, 8.0),
  "H200": ("NVIDIA H200", 140.0, 4.8),
  "H100": ("NVIDIA H100", 79.0, 3.35),
  "A100": ("NVIDIA A100", 79.0, 2.039),
  "A100-40": ("NVIDIA A100", 39.0, 1.555),
  "L40S": ("NVIDIA L40S", 44.0, 0.864),
  "L4": ("NVIDIA L4", 22.0, 0.3),
  "v6e": ("TPU v6 lite", 31.2, 1.64),
  "v5p": ("TPU v5", 95.0, 2.765),
  "v5e": ("TPU v5 lite", 15.7, 0.819),
  "v4": ("TPU v4", 30.7, 1.228),
}
_DEVICE = re.compile(r"(\d+)x(?:([\d.]+)Gi?B|([\w-]+))", re.IGNORECASE)
# XLA's default fraction of a GPU's memory.
_GPU_FRACTION = 0.75
_FRACTION_NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
# The one being written before an old one is removed, and the best one.
_MORE_CHECKPOINTS = 2


@dataclasses.dataclass(frozen=True)
class _Devices:
  """The planned devices.

  Attributes:
    number: of devices.
    kind: JAX's `device_kind`; empty if only the memory was given.
    memory: bytes.
    fraction: of the memory that a run may use.
    bandwidth: bytes of memory read per second; 0.0 if unknown.
  """

  number: int
  kind: str
  memory: float
  fraction: float
  bandwidth: float

  @property
  def budget(self) -> float:
    return self.fraction * self.memory


def print_plan(recipe: str) -> bool:
  """Prints the plan if --plan is set; returns whether it is.

  Raises:
    errors.ConfigError: if the run does not fit, or a check fails.
  """
  if not _PLAN.value:
    return False
  devices = _parse(_PLAN.value)
  _simulate(devices.number)
  config = arguments.parse_config(recipe)
  facts = plan_checks.run(config)
  _print_checks(facts.checks)
  if facts.shape is None:
    raise _failed(facts.checks)
  described = plan_memory.describe(
    config, facts.shape, prompt_tokens=facts.prompt_tokens
  )
  need = plan_memory.need(described, config, prompt_tokens=facts.prompt_tokens)
  disk = plan_checks.disk(arguments.workdir(), _disk_bytes(described, config))
  _print_checks([disk])
  _print_run(described, config, facts, devices)
  _print_memory(described, need, devices)
  if need.peak > devices.budget:
    raise _too_large(config, facts, need, devices)
  if any(check.status == "FAIL" for check in facts.checks):
    raise _failed(facts.checks)
  return True


def _parse(text: str) -> _Devices:
  """Parses the devices, given by name or by memory."""
  match = _DEVICE.fullmatch(text)
  names = {name.lower(): name for name in _DEVICES}
  if match and int(match[1]) and match[2]:
    return _Devices(int(match[1]), "", float(match[2]) * 2**30, 1.0, 0.0)
  if match and int(match[1]) and match[3].lower() in names:
    kind, memory, bandwidth = _DEVICES[names[match[3].lower()]]
    is_gpu = kind.startswith("NVIDIA")
    fraction = _fraction() if is_gpu else 1.0
    return _Devices(
      int(match[1]), kind, memory * 2**30, fraction, bandwidth * 1e12
    )
  raise errors.ConfigError(
    "Unknown device.",
    where=f"--plan={text}",
    why=f"It must be COUNTxDEVICE with one of {', '.join(_DEVICES)}, or "
    "COUNTxMEMORY.",
    fix="For example --plan=8xH100, or --plan=8x80GiB.",
  )


def _fraction() -> float:
  """Returns the fraction of a GPU's memory that XLA will use."""
  given = (os.environ.get(name, "") for name in _FRACTION_NAMES)
  return float(next(filter(None, given), _GPU_FRACTION))


def _simulate(num_devices: int) -> None:
  """Configures JAX to simulate `num_devices` devices on the CPU."""
  words = os.environ.get("XLA_FLAGS", "").split()
  name = "--xla_force_host_platform_device_count="
  os.environ["XLA_FLAGS"] = " ".join(w for w in words if name not in w)
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", num_devices)


def _num_steps(
  config: types.Config,
  facts: plan_checks.Facts,
) -> int | None:
  if config.loop.num_steps:
    return config.loop.num_steps
  if facts.steps_per_epoch is None:
    return None
  return math.ceil(config.num_epochs * facts.steps_per_epoch)


def _disk_bytes(
  described: plan_memory.RunShapes,
  config: types.Config,
) -> int:
  """Counts the bytes of the checkpoints and exports in the workdir."""
  checkpoints = config.checkpoint.keep + _MORE_CHECKPOINTS
  steps = config.export.keep_steps
  exports = bool(config.export.enabled) + (steps + 1 if steps else 0)
  model = described.policy.base
  return checkpoints * update_bytes.num_global_bytes(described.state) + (
    exports * save.num_bytes(model, config.export.dtype)
  )


def _step_flops(
  config: types.Config,
  facts: plan_checks.Facts,
  described: plan_memory.RunShapes,
) -> tuple[int, float]:
  """Counts the tokens and the model FLOPs of a training step."""
  shape = described.policy.base.config
  is_base_frozen = described.policy.adapters is not None
  if described.teacher is not None:
    longest = plan_memory.longest_row(config, facts.prompt_tokens)
    num_rows = config.batch.num_prompts * config.sampling.complete.group_size
    lengths = [round(facts.tokens_per_row or longest)] * num_rows
    update = flops.of_update(shape, lengths, is_base_frozen=is_base_frozen)
    teacher = described.teacher.model.config
    return sum(lengths), update + flops.of_forward(teacher, lengths)
  if config.recipe != "grpo":
    length = round(facts.tokens_per_row or described.rows.length)
    lengths = [length] * config.batch.size
    return sum(lengths), flops.of_update(
      shape, lengths, is_base_frozen=is_base_frozen
    )
  num_rows = config.batch.num_questions * config.sampling.teach.group_size
  longest = plan_memory.longest_row(config, facts.prompt_tokens)
  lengths = [longest] * num_rows
  update = flops.of_update(shape, lengths, is_base_frozen=is_base_frozen)
  num_scored = 2 if config.loss.kl_coef else 1
  total = config.batch.num_iterations * update
  return sum(lengths), total + num_scored * flops.of_forward(shape, lengths)


def _print_checks(checks: list[plan_checks.Check]) -> None:
  for check in checks:
    print(f"{check.status:<6}  {check.name:<22}  {check.found}")
    if check.status == "warn":
      print(f"{'':<32}{check.fix}")


def _print_run(
  described: plan_memory.RunShapes,
  config: types.Config,
  facts: plan_checks.Facts,
  devices: _Devices,
) -> None:
  """Prints steps, tokens and time."""
  steps = _num_steps(config, facts)
  tokens, step_flops = _step_flops(config, facts, described)
  rows = described.rows
  print()
  sizes = (f"{axis}={n}" for axis, n in described.mesh.shape.items())
  print(f"{devices.number} devices: {', '.join(sizes)}")
  print(
    f"A step: up to {tokens:,} tokens in {rows.num_microbatches} microbatches "
    f"of {rows.per_device} rows of {rows.length:,} tokens on each device"
  )
  state = update_bytes.num_global_bytes(described.state)
  print(f"Steps: {steps or 'unknown without data'}", end="; ")
  print(f"a checkpoint is {plan_checks.gib(state)}")
  peak = flops.peak(devices.kind)
  if peak is None:
    print("Time: unknown, since no device is named; try --plan=8xH100")
    return
  seconds = step_flops / (devices.number * peak * _MFU.value)
  print(f"Updates at {_MFU.value:.0%} MFU: {seconds:,.1f} s per step")
  if plan_memory.is_sampled(config):
    sampling = _print_sampling(described, config, facts, devices, peak)
    is_ahead = config.recipe == "grpo" and config.overlap.max_staleness > 0
    seconds = max(seconds, sampling) if is_ahead else seconds + sampling
  if steps:
    print(f"Time: {steps * seconds / 3600:,.1f} h for {steps} steps")


def _print_sampling(
  described: plan_memory.RunShapes,
  config: types.Config,
  facts: plan_checks.Facts,
  devices: _Devices,
  peak: float,
) -> float:
  """Prints the time of sampling; returns that of a later step."""
  found = plan_sampling.seconds(
    described,
    config,
    plan_sampling.Device(devices.bandwidth, peak),
    prompt_tokens=facts.prompt_tokens,
  )
  later = sum(s for phase, s in found.items() if not phase.is_cached)
  parts = ", ".join(
    f"{phase.name} {s:,.1f}" + " once per question" * phase.is_cached
    for phase, s in found.items()
  )
  print(
    f"Sampling at full memory bandwidth: {later:,.1f} s per step if every "
    f"completion has its most tokens ({parts})"
  )
  return later


def _print_memory(
  described: plan_memory.RunShapes, need: plan_memory.Need, devices: _Devices
) -> None:
  """Prints the estimated GiB per device, and XLA's count for an update."""
  print("\nGiB on each device, and when they are held")
  for name, size in need.resident.items():
    _print_size(name, size, "always; exact")
  for phase, parts in need.phases.items():
    for name, size in parts.items():
      _print_size(name, size, f"{phase}; estimated")
  _print_size(
    "peak",
    need.peak,
    f"{need.peak / devices.budget:.0%} of {plan_checks.gib(devices.budget)}, "
    f"which is {devices.fraction:.0%} of the device's memory",
  )
  if need.on_host:
    _print_size("in host memory", need.on_host, "for each device")
  compiled = update_bytes.compile_update(
    described.policy,
    described.state,
    described.optimizer,
    described.rows,
    mesh=described.mesh,
    teacher=described.teacher,
  )
  estimated = sum(need.phases["update"].values())
  print(
    f"Compiled for {devices.number} CPUs, an update takes "
    f"{plan_checks.gib(compiled.temporaries)} in addition to the state "
    f"(estimated: {plan_checks.gib(estimated)})"
  )


def _print_size(name: str, size: int, note: str) -> None:
  if size:
    print(f"  {name:<22}{size / 2**30:>10,.2f}  {note}")


def _failed(checks: list[plan_checks.Check]) -> errors.ConfigError:
  failed = [check for check in checks if check.status == "FAIL"]
  return errors.ConfigError(
    "The checks of the plan failed.",
    where=", ".join(check.name for check in failed),
    why=failed[0].found,
    fix=failed[0].fix,
  )


def _too_large(
  config: types.Config,
  facts: plan_checks.Facts,
  need: plan_memory.Need,
  devices: _Devices,
) -> errors.ConfigError:
  """Prints the peak with alternative settings; returns the error to raise."""
  if facts.shape is None:
    raise ValueError("The model is unknown: facts.shape is None.")
  print("\nIt does not fit. Peak GiB with one change, or with several:")
  fitting = []
  for changes in _alternatives(config):
    changed = plan_memory.with_changes(config, changes)
    described = plan_memory.describe(
      changed, facts.shape, prompt_tokens=facts.prompt_tokens
    )
    peak = plan_memory.need(
      described, changed, prompt_tokens=facts.prompt_tokens
    ).peak
    text = " ".join(f"--config.{k}={v}" for k, v in changes.items())
    fits = peak <= devices.budget
    fitting += [text] * fits
    print(f"  {peak / 2**30:>8,.2f}  {'fits' if fits else 'no  '}  {text}")
  if devices.fraction < 0.9 and need.peak <= 0.9 * devices.memory:
    fitting.insert(0, f"{_FRACTION_NAMES[1]}=0.9 in the environment")
  return errors.ConfigError(
    "The run does not fit in device memory.",
    where=f"--plan={_PLAN.value}",
    why=f"It needs {plan_checks.gib(need.peak)} of each device, and has "
    f"{plan_checks.gib(devices.budget)}: {devices.fraction:.0%} of the memory.",
    fix=f"Set {fitting[0]}."
    if fitting
    else "Use more devices along --config.mesh.fsdp, or a smaller model.",
  )


def _alternatives(
  config: types.Config,
) -> Iterator[dict[str, object]]:
  """Yields changes; those that keep results come first, alone and combined."""
  same: list[dict[str, object]] = []
  if "per_device" in config.batch and config.batch.per_device != 1:
    same.append({"batch.per_device": 1})
  if config.model.remat not in ("block", "offload"):
    same.append({"model.remat": "block"})
  is_sampled_here = (
    plan_memory.is_sampled(config) and config.rollout.backend == "jax"
  )
  if is_sampled_here:
    same.append({"sampler.max_rows": max(1, config.sampler.max_rows // 4)})
  if config.offload.get("reference") is False and config.loss.kl_coef:
    same.append({"offload.reference": True})
  if not config.offload.optimizer:
    same.append({"offload.optimizer": True})
  yield from same
  if len(same) > 1:
    yield {key: value for change in same for key, value in change.items()}
  if is_sampled_here:
    yield {"rollout.backend": "http"}
  if "reference" in config and config.loss.kl_coef and not config.lora.rank:
    yield {"reference.dtype": "bfloat16"}
  if not config.lora.rank:
    yield {"lora.rank": 16, "optimizer.rounding": "nearest"}
