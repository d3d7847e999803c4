"""A record that vLLM's built-in class builds in every step."""

from dataclasses import dataclass


@dataclass
class RequestAllocationRecord:
    """Blocks that vLLM gave to a request, and the tokens that they will hold."""

    req_id: str
    new_block_ids: list[int]
    new_token_ids: list[int]


BlockAllocationRecord = RequestAllocationRecord
