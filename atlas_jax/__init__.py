# SPDX-License-Identifier: Apache-2.0
"""Training of teacher language models with JAX."""
