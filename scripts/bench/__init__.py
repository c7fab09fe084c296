# SPDX-License-Identifier: Apache-2.0
"""Benchmarks; each prints a table and a ratio."""
