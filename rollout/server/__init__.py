# SPDX-License-Identifier: Apache-2.0
"""A rollout server: the HTTP app and the engines behind it."""
