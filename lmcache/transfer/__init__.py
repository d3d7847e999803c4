"""Moving raw KV bytes between an engine's paged blocks and chunk extents."""
