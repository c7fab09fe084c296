# SPDX-License-Identifier: Apache-2.0
"""Sampling: in process, or with rollout servers."""
