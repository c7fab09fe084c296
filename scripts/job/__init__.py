# SPDX-License-Identifier: Apache-2.0
"""Opens what a job is made of; the only package that imports every layer."""
