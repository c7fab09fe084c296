# SPDX-License-Identifier: Apache-2.0
"""Metrics, progress, timing, speed, samples and profiles of a run."""
