# SPDX-License-Identifier: Apache-2.0
"""Clients of rollout servers: sampling and weight updates."""
