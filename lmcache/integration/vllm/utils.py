"""Reading vLLM's configuration: where the server is, and what identifies a model's KV.

Comes in: vLLM's configuration and request objects. Goes out: `ConnectorConfig` and namespaces.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcache.errors import UsageError
from lmcache.keys import Namespace
from lmcache.layout import KVLayout
from lmcache.log import init_logger
from lmcache.protocol import DEFAULT_ZMQ_PORT, MAX_PART_CHARS, MAX_REVISION_PARTS
from lmcache.transfer.base import STAGING_BYTES
from lmcache.weights import ADAPTER_CONFIG, adapter_digest, adapter_label, weight_files, weights_digest

logger = init_logger(__name__)

PREFIX = "lmcache."
# The tests with a real engine passed on these (scripts/vllm_matrix.py), or benchmarks/gpu_engine.py did.
RUN_WITH_VLLM = ("0.25.1", "0.32.")
# The whole engine waits for a server that hangs, once, until the deadline. vLLM's own class gives it 300 s.
MAX_TIMEOUT_SECONDS = 30.0
_ADDRESS = re.compile(r"tcp://(\[[^\]\s]+\]|[^:/\s]+):\d{1,5}|ipc://\S+")


@dataclass(frozen=True)
class ConnectorConfig:
    """The `lmcache.*` keys of vLLM's `kv_connector_extra_config`, and their defaults."""

    url: str = f"tcp://localhost:{DEFAULT_ZMQ_PORT}"
    timeout_seconds: float = 2.0
    heartbeat_seconds: float = 1.0
    # Waited for in full only when the server freezes. Computing a long prompt takes longer than a busy host needs to answer.
    lookup_timeout_seconds: float = 2.0
    saves_decode: bool = False
    staging_bytes: int = STAGING_BYTES
    # Ask vLLM to keep all layers of a block side by side.
    cross_layer_blocks: bool = False
    # Do not start where KV on a GPU would be copied in the slower way.
    requires_native: bool = False
    # Keep a checksum of each chunk stored, and load none whose bytes differ. Reads all bytes once more each way.
    verifies_content: bool = False

    @classmethod
    def read(cls, extra: Mapping[str, Any]) -> ConnectorConfig:
        """Return the settings in vLLM's mapping.

        Raises: UsageError for an unknown key under `lmcache.` or a value that cannot be used.
        """
        known: dict[str, Callable[[str, object], Any]] = {
            "lmcache.mp.url": _text,
            "lmcache.mp.host": _text,
            "lmcache.mp.port": _port,
            "lmcache.mp.mq_timeout": _seconds,
            "lmcache.mp.heartbeat_interval": _seconds,
            "lmcache.mp.lookup_timeout": _seconds,
            "lmcache.mp.save_decode_cache": _flag,
            "lmcache.mp.staging_mib": _mebibytes,
            "lmcache.mp.cross_layer_blocks": _flag,
            "lmcache.mp.require_native": _flag,
            "lmcache.mp.verify_content": _flag,
        }
        for key in extra:
            if key.startswith(PREFIX) and key not in known:
                nearest = difflib.get_close_matches(key, known, 1) or list(known)
                raise UsageError(
                    f"unknown key {key!r} in kv_connector_extra_config",
                    hint=f"did you mean {nearest[0]!r}? known: {', '.join(known)}",
                )
        values = {key: read(key, extra[key]) for key, read in known.items() if key in extra}
        host = values.get("lmcache.mp.host", "tcp://localhost")
        port = values.get("lmcache.mp.port", DEFAULT_ZMQ_PORT)
        url = _with_scheme(values.get("lmcache.mp.url", f"{host}:{port}"))
        if not _ADDRESS.fullmatch(url):
            key = "lmcache.mp.url" if "lmcache.mp.url" in values else "lmcache.mp.host"
            raise _refuse(key, values[key], "the server's ZMQ address, such as tcp://host:5555 or ipc:///path")
        return cls(
            url=url,
            timeout_seconds=min(values.get("lmcache.mp.mq_timeout", cls.timeout_seconds), MAX_TIMEOUT_SECONDS),
            heartbeat_seconds=values.get("lmcache.mp.heartbeat_interval", cls.heartbeat_seconds),
            lookup_timeout_seconds=min(
                values.get("lmcache.mp.lookup_timeout", cls.lookup_timeout_seconds), MAX_TIMEOUT_SECONDS
            ),
            saves_decode=values.get("lmcache.mp.save_decode_cache", cls.saves_decode),
            staging_bytes=values.get("lmcache.mp.staging_mib", cls.staging_bytes),
            cross_layer_blocks=values.get("lmcache.mp.cross_layer_blocks", cls.cross_layer_blocks),
            requires_native=values.get("lmcache.mp.require_native", cls.requires_native),
            verifies_content=values.get("lmcache.mp.verify_content", cls.verifies_content),
        )


def _with_scheme(address: str) -> str:
    return address if "://" in address else f"tcp://{address}"


def _refuse(key: str, value: object, expected: str) -> UsageError:
    return UsageError(
        f"{key} is {value!r}, expected {expected}",
        hint="correct kv_connector_extra_config in --kv-transfer-config",
    )


def _text(key: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _refuse(key, value, "text such as 'tcp://localhost'")
    return value


def _port(key: str, value: object) -> int:
    text = str(value)
    if isinstance(value, bool) or not text.isdigit() or not 0 < int(text) < 1 << 16:
        raise _refuse(key, value, "a port from 1 to 65535")
    return int(text)


def _seconds(key: str, value: object) -> float:
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        seconds = -1.0
    if isinstance(value, bool) or not 0 < seconds < float("inf"):
        raise _refuse(key, value, "a number of seconds above 0")
    return seconds


def _mebibytes(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 16:
        raise _refuse(key, value, "a whole number of MiB from 1 to 65536")
    return value << 20


def _flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _refuse(key, value, "true or false")
    return value


def uses_multi_connector(vllm_config: Any) -> bool:
    """Tell whether the engine's connector is a MultiConnector; those that it holds are given a configuration of their own."""
    transfer = vllm_config.kv_transfer_config
    return transfer is not None and transfer.kv_connector == "MultiConnector"


def mla_enabled(model_config: Any) -> bool:
    """Tell whether the model keeps one latent vector a token instead of keys and values."""
    return bool(getattr(model_config, "use_mla", False))


@dataclass(frozen=True)
class EngineIdentity:
    """What all requests of an engine have in common; the chunk size is still open (0).

    `revision_parts`: by name what the namespace's revision is a digest of. No key depends on them.
    """

    namespace: Namespace
    revision_parts: dict[str, str]


def identify_engine(vllm_config: Any, layout: KVLayout, is_replicated: bool = False) -> EngineIdentity:
    """Return what this engine shares its KV by.

    Args:
        is_replicated: all ranks hold the same KV.
    Raises: UsageError when KV means something in this one process only.
    """
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        raise UsageError(
            "calculate_kv_scales makes up scales of the KV from an engine's first request: no other engine could read it",
            hint="take it out, and use a checkpoint that has its scales",
        )
    num_ranks = vllm_config.parallel_config.world_size
    commit, parts = _model_revision(vllm_config, num_ranks if is_replicated else 1)
    namespace = Namespace(
        model=str(vllm_config.model_config.model),
        revision=f"{commit}#{_short_digest(parts)}",
        dtype=layout.dtype,
        layout=layout.fingerprint,
        chunk_size=0,
        world_size=1 if is_replicated else num_ranks,
    )
    return EngineIdentity(namespace, _told_briefly({"commit": commit, **parts}))


def _model_revision(vllm_config: Any, num_copies: int) -> tuple[str, dict[str, object]]:
    """Return the model's commit or revision, and all else that decides what its KV holds.

    A folder has no revision, so a sample of its weights stands for it: a checkpoint that was
    overwritten in place must not find the old one's KV. Of `cache_dtype` the tensors do not tell: they are bytes for both
    kinds of fp8. Models scale positions by how long a prompt may be. How many ranks compute the same KV decides in which order
    they add up, and so the last bits of it.
    """
    model, load = vllm_config.model_config, getattr(vllm_config, "load_config", None)
    media, lora = getattr(model, "multimodal_config", None), getattr(vllm_config, "lora_config", None)
    config, path = model.hf_config, Path(str(model.model))
    load_format = getattr(load, "load_format", None)
    download_dir = getattr(load, "download_dir", None)
    _, commit, weights = _weights_of(model, download_dir)
    parts: dict[str, object] = {
        "config": config.to_dict() if hasattr(config, "to_dict") else repr(config),
        "dtype": str(model.dtype),
        "quantization": [str(model.quantization), getattr(model, "quantization_config", None)],
        "kv_cache_dtype": str(vllm_config.cache_config.cache_dtype),
        # As it was asked for: what `auto` comes to depends on how much memory is free, and models were built before that.
        "max_model_len": getattr(model, "original_max_model_len", None),
        "load": [load_format, getattr(load, "model_loader_extra_config", None)],
        "url": str(getattr(model, "model_weights", "")),
        "media": [getattr(media, name, None) for name in ("mm_processor_kwargs", "video_pruning_rate")],
        "lora": getattr(lora, "target_modules", None),
        "weights": weights,
    }
    if load_format == "dummy":
        parts["seed"] = model.seed
    draft = getattr(getattr(vllm_config, "speculative_config", None), "draft_model_config", None)
    if draft is not None and draft.model != model.model:  # its layers' KV is part of each block
        parts["draft"] = _weights_of(draft, download_dir)
    if num_copies > 1:
        parts["copies"] = str(num_copies)
    if not (commit or path.exists()):
        parts["engine"] = [vllm_config.instance_id, vllm_config.kv_transfer_config.engine_id]
        logger.warning("what is cached is of no use to other engines: no commit of %s is known; hint: --revision", model.model)
    return commit, parts


def _told_briefly(parts: Mapping[str, object]) -> dict[str, str]:
    """Return as much of the parts of a revision as a message may hold, the fields of the model's settings last."""
    config = parts["config"]
    fields = {f"config.{name}": value for name, value in config.items()} if isinstance(config, dict) else {"config": config}
    told = {name: value for name, value in parts.items() if name != "config"} | fields
    return {
        _as_text(name)[:MAX_PART_CHARS]: _brief(value) for name, value in itertools.islice(told.items(), MAX_REVISION_PARTS)
    }


def _brief(value: object) -> str:
    text = _as_text(value)
    return text if len(text) <= MAX_PART_CHARS else _short_digest(value)


def _as_text(value: object) -> str:
    """ASCII, whatever the value holds."""
    return _as_json(value).strip('"')


def _short_digest(value: object) -> str:
    return hashlib.sha256(_as_json(value).encode()).hexdigest()[:16]


def _as_json(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=_described)


def _weights_of(model: Any, download_dir: str | None) -> list[str]:
    """Return what tells a model's weights from others."""
    path = Path(str(model.model))
    return [str(model.model), _commit_of(model, download_dir), weights_digest(path) if path.exists() else ""]


def _commit_of(model: Any, download_dir: str | None) -> str:
    """Return the commit of a repository's weights, or the revision that was asked for; "" where neither is known."""
    commit = "" if getattr(model, "hf_config_path", None) else getattr(model.hf_config, "_commit_hash", None)
    return commit or hub_commit(str(model.model), model.revision, download_dir) or model.revision or ""


def hub_commit(repository: str, revision: str | None = None, download_dir: str | None = None) -> str:
    """Return the commit that Hugging Face's cache has for a revision, usually `main`; "" where it has none."""
    try:
        return hub_ref(repository, revision, download_dir).read_text().strip()
    except (ImportError, OSError, ValueError):
        return ""


def hub_ref(repository: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """Return the file in which Hugging Face's cache keeps a revision's commit.

    Raises: ImportError.
    """
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(download_dir or HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")
    return folder / "refs" / (revision or "main")


def _described(value: object) -> str:
    """An object without a text of its own would be described by its address, new in each run."""
    return type(value).__name__ if type(value).__repr__ is object.__repr__ else str(value)


def media_are_hashed(vllm_config: Any) -> bool:
    """Tell whether a medium's identifier stands for its content; with both of vLLM's caches off it is a running number."""
    media = getattr(vllm_config.model_config, "multimodal_config", None)
    return media is None or media.mm_processor_cache_gb > 0 or bool(vllm_config.cache_config.enable_prefix_caching)


class Adapters:
    """The LoRA adapters that an engine's requests name, told from others of the same name and place by what they hold.

    One whose files cannot be read, or are newer than the engine, which may still compute with what they were, is this engine's.
    """

    def __init__(self) -> None:
        self._engine = secrets.token_hex(8)
        self._started_at = time.time()
        self._digests: dict[str, tuple[object, str]] = {}

    def label(self, lora: Any) -> str:
        """Return what stands for a request's adapter in its namespace."""
        try:
            digest = self._digest(lora.lora_path)
        except (ImportError, OSError, RuntimeError, ValueError):  # RuntimeError: `~name` of nobody
            digest = self._engine
        return adapter_label(lora.lora_name, lora.lora_path, digest)

    def _digest(self, path: str) -> str:
        """Return a digest of an adapter's files, read anew where they have changed.

        Raises: OSError, ImportError.
        """
        folder = Path(path).expanduser()
        files = [*weight_files(folder), folder / ADAPTER_CONFIG] if folder.is_dir() else [hub_ref(path)]
        stats = [file.stat() for file in files]
        state = [
            (file, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            for file, stat in zip(files, stats, strict=True)
        ]
        known, digest = self._digests.get(path, (None, ""))
        if known != state:
            digest = adapter_digest(folder) if folder.is_dir() else files[0].read_text().strip()
            if any(stat.st_ctime >= self._started_at for stat in stats):
                digest = f"{self._engine} {digest}"
            self._digests[path] = state, digest
        return digest


def layout_of_joined_layers() -> str | None:
    """Return vLLM's name for blocks that hold all layers, in its usual order within a layer; None before it had one (0.25)."""
    try:
        from vllm.v1.kv_cache_layout import KVCacheLayout
    except ImportError:
        return None
    return "BLNHC" if "BLNHC" in KVCacheLayout.__members__ else None


def software(connector: str, is_worker: bool = False) -> list[str]:
    """Return the versions that decide how we get on with vLLM, a worker's with those of its GPU's software; warns when vLLM's
    was never run with ours."""
    from vllm import __version__ as vllm_version

    if not vllm_version.startswith(RUN_WITH_VLLM):
        logger.warning(
            "vLLM %s was not run with this version of lmcache; those that were: %s", vllm_version, ", ".join(RUN_WITH_VLLM)
        )
    return [f"vllm {vllm_version}", connector, *(_gpu_software() if is_worker else [])]


def _gpu_software() -> list[str]:
    """Return the CUDA that PyTorch was built with and the latest that the driver supports; [] where there is no GPU."""
    import torch

    from lmcache.transfer.driver import CudaError, driver

    if not torch.version.cuda:
        return []
    try:
        return [f"CUDA {torch.version.cuda}", f"driver for CUDA {driver().cuda_version()}"]
    except CudaError:
        return []


def process_token(pid: int) -> str:
    """Return a name of a process that no other has, on this host or another, now or later; "" when it is gone."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pid_space = os.readlink("/proc/self/ns/pid")
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    started_at = after_name[19]  # field 22 of proc_pid_stat(5), in clock ticks after boot
    return f"{boot} {pid_space} {pid} {started_at}"


def request_namespace(engine: Namespace, request: Any, adapters: Adapters) -> Namespace:
    """Return the engine's namespace narrowed to one request's adapter, media and tenant."""
    media = [
        (feature.identifier, feature.mm_position.offset, feature.mm_position.length) for feature in request.mm_features or ()
    ]
    return engine.for_request(
        lora=adapters.label(request.lora_request) if request.lora_request is not None else "",
        multimodal=hashlib.sha256(json.dumps(media).encode()).hexdigest() if media else "",
        cache_salt=request.cache_salt or "",
    )


def is_cacheable(request: Any) -> bool:
    """Tell whether the request's token ids decide its KV and stay what they are."""
    return request.prompt_token_ids is not None and request.prompt_embeds is None and not request.resumable


def must_compute(request: Any) -> bool:
    """Tell whether the request wants something of each of its prompt's tokens, such as log probabilities. vLLM 0.25 asks us all
    the same."""
    return bool(getattr(request, "skip_reading_prefix_cache", False))
