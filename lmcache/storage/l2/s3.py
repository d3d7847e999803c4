"""L2 in a bucket: one object a value, in S3 and what speaks like it, Google Cloud Storage or Azure Blob Storage.

Comes in: keys and memory. Goes out: PUT, GET, HEAD, DELETE and LIST by obstore, one client for the three. It signs, keeps
connections, and tries again what failed on the way. An object is there whole or not at all. What is evicted, and when, is a
lifecycle rule of the bucket.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from datetime import timedelta
from typing import Any

import obstore
from obstore import exceptions
from obstore import store as stores

from lmcache.errors import UsageError
from lmcache.storage.l2.base import L2Adapter, L2Error, Parts, Reason, Usage, check_length
from lmcache.storage.l2.spec import AdapterSpec, ObjectStoreSettings

DEFAULT_REGION = "us-east-1"
BATCH_KEYS = 1000  # of one request to delete
MAX_MESSAGE_CHARS = 300
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
# A URL's query may carry a signature.
_QUERY = re.compile(r"\?\S*")
_REASONS_BY_STATUS = {
    "401": Reason.DENIED,
    "403": Reason.DENIED,
    "404": Reason.UNREACHABLE,  # a missing object is no error here: the bucket is missing
    "405": Reason.READ_ONLY,
    "408": Reason.TIMEOUT,
    "413": Reason.FULL,
    "429": Reason.UNREACHABLE,
    "500": Reason.UNREACHABLE,
    "502": Reason.UNREACHABLE,
    "503": Reason.UNREACHABLE,
    "504": Reason.TIMEOUT,
    "507": Reason.FULL,
}
_REASONS_BY_CODE = {
    "QuotaExceeded": Reason.FULL,
    "EntityTooLarge": Reason.FULL,
    "XMinioStorageFull": Reason.FULL,
    "RequestTimeout": Reason.TIMEOUT,
}


class ObjectStoreAdapter(L2Adapter):
    """One folder of one bucket."""

    def __init__(self, spec: AdapterSpec) -> None:
        assert isinstance(spec.settings, ObjectStoreSettings)
        self._settings = spec.settings
        self.keys_at_once = spec.settings.max_requests
        self._prefix = spec.settings.prefix + "/"
        self._name = f"{spec.name}://{spec.settings.bucket}"
        try:
            self._store = _make_store(spec.name, spec.settings)
        except (exceptions.BaseError, ValueError) as exc:
            raise UsageError(f"L2 adapter {spec.name}: {_first_line(exc)}") from exc
        self._mutex = threading.Lock()
        self._threads: futures.ThreadPoolExecutor | None = None

    def put(self, key: str, parts: Parts) -> None:
        """See the contract. One request: an upload in several could leave some behind."""
        views = [part.cast("B") for part in parts if part.nbytes]
        with self._as_l2_error(f"put {key}"):
            obstore.put(self._store, self._path(key), views, use_multipart=False)

    def get(self, key: str, parts: Parts) -> bool:
        """See the contract."""
        with self._as_l2_error(f"get {key}"):
            try:
                found = obstore.get(self._store, self._path(key))
            except FileNotFoundError:
                return False
            length, expected = found.meta["size"], sum(part.nbytes for part in parts)
            value, at = memoryview(found.bytes() if length == expected else b""), 0
            del found  # and with it the connection, where the value was not wanted: an error keeps what it sees
            check_length(key, length, expected)
            check_length(key, len(value), expected)
            for part in parts:
                part.cast("B")[:] = value[at : at + part.nbytes]
                at += part.nbytes
        return True

    def lengths(self, keys: Sequence[str]) -> list[int | None]:
        """See the contract: one HEAD for each key, `max-requests` at a time."""
        deadline = time.monotonic() + 2 * self._settings.timeout_seconds
        with self._as_l2_error("look up"):
            waiting = [self._executor().submit(self._length, key) for key in keys]
            try:
                return [one.result(max(0.0, deadline - time.monotonic())) for one in waiting]
            finally:
                for one in waiting:
                    one.cancel()

    def delete(self, keys: Sequence[str]) -> int:
        """See the contract. The service does not say what was there: that is looked up before."""
        lengths = self.lengths(keys)
        paths = [self._path(key) for key, length in zip(keys, lengths, strict=True) if length is not None]
        with self._as_l2_error("delete"):
            return self._delete(paths)

    def clear(self) -> int:
        """See the contract: every object in the folder, none in folders below."""
        with self._as_l2_error("clear"):
            listed = obstore.list(self._store, self._prefix, chunk_size=BATCH_KEYS)
            return sum(self._delete([item["path"] for item in batch if self._is_ours(item["path"])]) for batch in listed)

    def usage(self) -> Usage:
        """See the contract: only a list of all objects would tell."""
        return Usage()

    def ping(self) -> None:
        """List what comes after the last value: nothing, or an error without a bucket or access. It writes nothing."""
        with self._as_l2_error("list"):
            next(iter(obstore.list(self._store, self._prefix, offset=self._prefix + "~")), None)

    def close(self) -> None:
        """See the contract."""
        with self._mutex:
            threads, self._threads = self._threads, None
        self._store = None  # its connections go with it
        if threads is not None:
            threads.shutdown(wait=True, cancel_futures=True)

    def _path(self, key: str) -> str:
        return self._prefix + key

    def _is_ours(self, path: str) -> bool:
        return path.startswith(self._prefix) and "/" not in path.removeprefix(self._prefix)

    def _length(self, key: str) -> int | None:
        try:
            return int(obstore.head(self._store, self._path(key))["size"])
        except FileNotFoundError:
            return None

    def _delete(self, paths: Sequence[str]) -> int:
        if paths:
            obstore.delete(self._store, paths)
        return len(paths)

    def _executor(self) -> futures.ThreadPoolExecutor:
        with self._mutex:
            if self._threads is None:
                self._threads = futures.ThreadPoolExecutor(self._settings.max_requests, "lmcache-l2-head")
            return self._threads

    @contextlib.contextmanager
    def _as_l2_error(self, action: str) -> Iterator[None]:
        try:
            yield
        except (futures.TimeoutError, TimeoutError) as exc:
            raise L2Error(f"{self._name}: cannot {action} in time", code=Reason.TIMEOUT) from exc
        except (exceptions.BaseError, OSError) as exc:
            raise L2Error(f"{self._name}: cannot {action}: {_first_line(exc)}", code=_reason(str(exc))) from exc


def _make_store(name: str, settings: ObjectStoreSettings) -> Any:
    timeout = timedelta(seconds=settings.timeout_seconds)
    options: dict[str, Any] = {
        "client_options": {
            "timeout": timeout,
            "connect_timeout": timeout,
            "allow_http": settings.endpoint.startswith("http://"),
        },
        "retry_config": {
            "max_retries": settings.retries,
            "retry_timeout": timeout,
            "backoff": {"init_backoff": timedelta(milliseconds=50), "max_backoff": timedelta(seconds=1)},
        },
    }
    config: dict[str, Any] = {}
    if name == "gs":
        if settings.endpoint:
            config["base_url"] = settings.endpoint
        return stores.GCSStore(settings.bucket, config=config, **options)
    if settings.endpoint:
        config["endpoint"] = settings.endpoint
    if name == "az":
        config["account_name"] = settings.account
        return stores.AzureStore(settings.bucket, config=config, **options)
    variables = (os.environ.get("AWS_REGION"), os.environ.get("AWS_DEFAULT_REGION"))
    config["region"] = settings.region or next(filter(None, variables), DEFAULT_REGION)
    if settings.access_key_id:
        config |= {"access_key_id": settings.access_key_id, "secret_access_key": settings.secret_access_key}
    return stores.S3Store(settings.bucket, config=config, **options)


def _first_line(error: Exception) -> str:
    """Return what obstore's message says for people, without what follows for its makers."""
    text = " ".join(str(error).partition("Debug source:")[0].split())
    return _QUERY.sub("", text)[:MAX_MESSAGE_CHARS] or type(error).__name__


def _reason(text: str) -> Reason:
    """Return the reason of an error of obstore, which has classes for few of them."""
    code, status = _CODE.search(text), _STATUS.search(text)
    if code and code[1] in _REASONS_BY_CODE:
        return _REASONS_BY_CODE[code[1]]
    if status:
        return _REASONS_BY_STATUS.get(status[1], Reason.ERROR)
    if "TimedOut" in text or "timed out" in text:
        return Reason.TIMEOUT
    is_http = "HTTP error" in text or "error sending request" in text or "source: reqwest" in text
    return Reason.UNREACHABLE if is_http else Reason.ERROR
