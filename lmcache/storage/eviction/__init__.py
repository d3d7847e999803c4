"""Eviction policies by name."""

from __future__ import annotations

import importlib

from lmcache.errors import UsageError
from lmcache.storage.eviction.base import EvictionPolicy

POLICIES = {"LRU": "lmcache.storage.eviction.lru:LRUPolicy"}


def make_policy(name: str) -> EvictionPolicy:
    """Return a new policy.

    Raises: UsageError for a name that is not in POLICIES.
    """
    if name not in POLICIES:
        raise UsageError(f"unknown eviction policy {name!r}", hint="known: " + ", ".join(POLICIES))
    module_name, _, class_name = POLICIES[name].partition(":")
    policy: EvictionPolicy = getattr(importlib.import_module(module_name), class_name)()
    return policy
