# SPDX-License-Identifier: Apache-2.0
"""Benchmarks. Each prints a table and a ratio."""
