"""The names that vLLM's own connector class imports; without them vLLM finds none of ours.

vLLM resolves `"kv_connector": "LMCacheMPConnector"` to the class in `lmcache_mp_connector.py`. Its own class, which works
through the adapters in here, is used only where somebody asks for it with LMCACHE_USE_UPSTREAM_MP, or where ours cannot be
imported. It is refused: it tells its adapters a request's tokens and salt, but neither its LoRA adapter nor its images, so
that one adapter's KV would be served to another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from lmcache.errors import UsageError


class ParallelStrategy(NamedTuple):
    """How the engine's ranks are arranged; `kv_*` counts what differs in its KV."""

    use_mla: bool
    kv_world_size: int
    kv_worker_id: int
    actual_world_size: int
    actual_worker_id: int
    tp_size: int
    pp_size: int


@dataclass
class LoadStoreOp:
    """Tokens [start, end) of a request, and the engine blocks that hold their KV."""

    token_ids: list[int]
    block_ids: list[int]
    start: int
    end: int
    skip_first_n_tokens: int = 0

    def __len__(self) -> int:
        return len(self.block_ids)


class _Adapter:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise UsageError(
            "vLLM's own LMCacheMPConnectorUpstream is not supported by this version of lmcache: unset"
            " LMCACHE_USE_UPSTREAM_MP, and vLLM takes the class of the lmcache package; if it is not set, vLLM's log says"
            " 'External LMCacheMPConnector is not available' and why"
        )


class LMCacheMPSchedulerAdapter(_Adapter):
    """What vLLM's own class would use in the scheduler's process."""


class LMCacheMPWorkerAdapter(_Adapter):
    """What vLLM's own class would use in a worker's process."""
