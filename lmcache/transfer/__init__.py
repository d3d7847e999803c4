"""Moving raw KV bytes between an engine's paged blocks and chunk extents: a copier for each kind of device."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmcache.errors import UsageError

if TYPE_CHECKING:
    import torch

    from lmcache.layout import KVLayout
    from lmcache.transfer.base import ChunkCopier

COPIERS = {"cpu": "lmcache.transfer.cpu:CpuCopier", "cuda": "lmcache.transfer.cuda:CudaCopier"}


def make_copier(layout: KVLayout, planes: Sequence[torch.Tensor], **settings: int) -> ChunkCopier:
    """Return the copier for the device that an engine's KV lies on.

    Args:
        planes: one for each plane of each layer, as `cpu.block_planes` returns them.
        settings: the constructor's, of a device that has any.
    Raises: UsageError for a device that there is no copier for; what the constructor raises.
    """
    kind = planes[0].device.type
    if kind not in COPIERS:
        raise UsageError(f"KV on {planes[0].device} cannot be copied by this version", hint="known: " + ", ".join(COPIERS))
    module_name, _, class_name = COPIERS[kind].partition(":")
    copier: ChunkCopier = getattr(importlib.import_module(module_name), class_name)(layout, planes, **settings)
    return copier
