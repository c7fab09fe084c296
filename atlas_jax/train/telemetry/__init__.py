# SPDX-License-Identifier: Apache-2.0
"""What a run reports: metrics, time, speed, samples, traces."""
