# SPDX-License-Identifier: Apache-2.0
"""Run guards: metric alarms, sampler agreement, non-finite updates, hangs."""
