"""The product's connector with a fake of a GPU's copier, for a real vLLM on the CPU (`kv_connector_module_path`).

Stores go on in the background, slowly: so vLLM has to keep the blocks of ended requests, and to leave alone those of preempted
ones, as on a GPU.
"""

from __future__ import annotations

from typing import Any

import lmcache.transfer
from lmcache.integration.vllm.lmcache_mp_connector import LMCacheMPConnector
from tests.integration.later_copier import LaterCopier

PAUSE_SECONDS = 0.01


def make_later_copier(layout: Any, planes: Any, **_: int) -> LaterCopier:
    """Stand in for `lmcache.transfer.make_copier`."""
    return LaterCopier(layout, planes, pause_seconds=PAUSE_SECONDS, load_bytes=0)


class LaterConnector(LMCacheMPConnector):
    """Stores later."""

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Take over vLLM's KV tensors."""
        lmcache.transfer.make_copier = make_later_copier
        super().register_kv_caches(kv_caches)
