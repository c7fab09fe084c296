# SPDX-License-Identifier: Apache-2.0
"""Trains teacher language models with JAX."""
