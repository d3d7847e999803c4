"""The HTTP routes: health, status, clear and metrics for people, probes and scrapers.

Each asks the owner thread like any client does, with a deadline, so health means that the loop answers. There is no route that
runs code, reads files or shows the environment. Routes that change something need the token where one is set, and are
refused without one where the server listens beyond loopback.
"""

from __future__ import annotations

import asyncio
import hmac
from typing import Annotated, TypeVar

import msgspec
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from lmcache import __version__
from lmcache.errors import RemoteError
from lmcache.log import RateLimitedLog, init_logger
from lmcache.metrics import Metrics
from lmcache.protocol import Clear, ClearTier, Noop, Reply, Status
from lmcache.protocol import Request as OwnerRequest
from lmcache.server.zmq_frontend import OWNER_DEADLINE_SECONDS, ZmqFrontend

logger = init_logger(__name__)

R = TypeVar("R", bound=Reply)


def make_app(owner: ZmqFrontend, metrics: Metrics | None, token: str, may_change: bool) -> FastAPI:
    """Return the ASGI application.

    Args:
        metrics: None leaves `/metrics` out.
        token: what a bearer must present to change anything; "" asks for none.
        may_change: whether changing routes are served at all.
    """
    app = FastAPI(
        title="lmcache server",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
    )

    log = RateLimitedLog(logger)

    async def ask(request: OwnerRequest[R], deadline_seconds: float = OWNER_DEADLINE_SECONDS) -> R:
        return await asyncio.wait_for(asyncio.wrap_future(owner.call(request)), deadline_seconds)

    @app.exception_handler(asyncio.TimeoutError)
    async def owner_is_silent(_: Request, __: Exception) -> JSONResponse:
        return _error(503, "owner_silent", "the owner thread does not answer", "restart the server")

    @app.exception_handler(Exception)
    async def failed(_: Request, exc: Exception) -> JSONResponse:
        log.warning(type(exc).__name__, f"an HTTP request failed: {exc!r}")
        return _error(500, "internal", f"the request failed in the server: {exc!r}", "see the server's log")

    @app.exception_handler(RemoteError)
    async def refused(_: Request, exc: RemoteError) -> JSONResponse:
        return _error(400, exc.code, exc.message, exc.hint)

    def check_may_change(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1")  # the bytes as they came
        if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})
        if not may_change:
            raise HTTPException(403, "beyond loopback this route needs a token: see --http-token-file")
        if "origin" in request.headers:
            raise HTTPException(403, "web pages may not change the cache")

    @app.get("/livez", summary="Does the owner thread answer?")
    async def livez() -> JSONResponse:
        await ask(Noop())
        return JSONResponse({"status": "ok", "problems": []})

    @app.get("/readyz", summary="Can the server do its work: allocate, evict, answer?")
    @app.get("/healthcheck", summary="The same as /readyz")
    @app.get("/api/healthcheck", summary="The same as /readyz")
    async def readyz() -> JSONResponse:
        problems = (await ask(Noop())).problems
        return JSONResponse({"status": "fail" if problems else "ok", "problems": problems}, 503 if problems else 200)

    @app.get("/api/status", summary="The status view")
    async def status() -> JSONResponse:
        return JSONResponse((await ask(Status())).status)

    @app.post("/api/clear", summary="Remove every chunk that is not pinned")
    async def clear(
        request: Request,
        dry_run: bool = False,
        force: bool = False,
        timeout_seconds: Annotated[float, Query(ge=0, le=3600)] = 4.0,
        tier: ClearTier = ClearTier.ALL,
    ) -> JSONResponse:
        check_may_change(request)
        wanted = Clear(dry_run=dry_run, force=force, timeout_seconds=timeout_seconds, tier=tier)
        reply = await ask(wanted, OWNER_DEADLINE_SECONDS + timeout_seconds)
        fields = msgspec.to_builtins(reply)
        return JSONResponse({key: value for key, value in fields.items() if key not in ("boot", "error")})

    if metrics is not None:

        @app.get("/metrics", summary="Prometheus metrics")
        async def scrape() -> Response:
            await ask(Status())
            return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _error(status: int, code: str, message: str, hint: str) -> JSONResponse:
    return JSONResponse({"ok": False, "error": {"code": code, "message": message, "hint": hint}}, status)
