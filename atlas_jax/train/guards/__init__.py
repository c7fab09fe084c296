# SPDX-License-Identifier: Apache-2.0
"""Watches over a run: alarms, agreement, non-finite values, hangs."""
