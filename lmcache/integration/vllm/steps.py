"""What the plug-in's two halves tell each other through vLLM: plain data, which is pickled if they are two processes.

`scheduler.py` writes a `StepPlan` for every step, `worker.py` carries it out and answers with a
`StepReport`. At start the worker says in a `WorkerHello` what its KV looks like.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from lmcache.keys import KEY_BYTES, Namespace
from lmcache.layout import KVLayout
from lmcache.protocol import Placement


@dataclass(frozen=True)
class ChunkSpan:
    """Consecutive chunks of one request: their keys, and the engine blocks that hold their tokens.

    `block_ids` starts with block `skip_blocks` of the first chunk and may end inside the last one.

    `places` says where chunks to load lie in the pool of the server life `boot`: chunk by chunk, in each chunk shard by shard
    (`WorkerHello.shard`); or it is empty. The scheduler's lookup keeps them pinned until it hears that the load is over.
    """

    request_id: str
    keys: bytes
    block_ids: list[int]
    blocks_per_chunk: int
    skip_blocks: int = 0
    places: list[Placement] = field(default_factory=list)
    boot: str = ""

    @property
    def num_chunks(self) -> int:
        """How many chunks there are."""
        return len(self.keys) // KEY_BYTES

    def places_of(self, shard: int) -> list[Placement]:
        """Return the place of each chunk of one shard; [] where they are not known."""
        num_shards = len(self.places) // max(1, self.num_chunks)
        return self.places[shard::num_shards] if shard < num_shards else []


@dataclass(frozen=True)
class StoreSpan(ChunkSpan):
    """Chunks to store. `parent` is the key before the first; it is empty at a prompt's start.

    Chunks from `num_prompt_chunks` on hold generated tokens.
    """

    namespace_id: int = 0
    parent: bytes = b""
    num_prompt_chunks: int = 1 << 30


@dataclass
class StepPlan:
    """What the worker does before (loads) and after (stores) the forward pass of one step.

    Plans are numbered from 1. `held`: requests that have ended, whose blocks vLLM keeps until each worker has once reported
    that it has read them. `preempted`: requests whose blocks vLLM has taken away before this step. `given_up`: requests that
    ended while they were loaded, of which nobody will compute. `is_idle`: the step computes nothing.
    """

    loads: list[ChunkSpan] = field(default_factory=list)
    stores: list[StoreSpan] = field(default_factory=list)
    held: frozenset[str] = frozenset()
    preempted: frozenset[str] = frozenset()
    given_up: frozenset[str] = frozenset()
    is_idle: bool = False
    number: int = 0


@dataclass(frozen=True)
class StepReport:
    """How far each rank is, by the numbers of plans.

    `loaded_up_to`: the last plan with loads of which, and of all before it, nothing is left to load. `stored_up_to`: the last
    plan of which, and of all before it, nothing is left to store.
    """

    loaded_up_to: dict[int, int] = field(default_factory=dict)
    stored_up_to: dict[int, int] = field(default_factory=dict)

    def merge(self, other: StepReport) -> StepReport:
        """Return both workers' reports as one."""
        return StepReport(
            {**self.loaded_up_to, **other.loaded_up_to},
            {**self.stored_up_to, **other.stored_up_to},
        )


@dataclass(frozen=True)
class WorkerHello:
    """The worker's namespace (its chunk size is 0: that is the server's) and layout, or why not.

    An engine of `num_ranks` ranks keeps `namespace.world_size` different shards of KV, one a rank. With MLA there is one, and
    all ranks have it: then the first rank stores it, and all load it.
    `copies_later`: whether a plan's loads and stores may go on after its step. A request waits for its load, and is let go on
    only when each rank has told that it is over, or nearly.
    """

    namespace: Namespace | None = None
    layout: KVLayout | None = None
    refusal: str = ""
    copies_later: bool = False
    rank: int = 0
    num_ranks: int = 1

    @property
    def shard(self) -> int:
        """Which shard of the KV the rank has: what the server calls a rank in keys, places and stores."""
        return self.rank % self.namespace.world_size if self.namespace is not None else 0

    @property
    def is_storing(self) -> bool:
        """Whether it is this rank that stores its shard."""
        return self.rank == self.shard
