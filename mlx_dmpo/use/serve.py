"""The ranker over HTTP: rerank in the shape that Jina, Cohere, vLLM and llama.cpp agree on, explain, items, a page"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import os
import re
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from ..config import ServeSettings
from ..errors import Interrupted, UserError
from ..machine import console, memory
from ..model.loading import import_mlx_lm
from . import explain as explanations
from .inputs import DataSet, read_data
from .ranker import Ranker, settings_for
from .requests import Refused, Rerank, explain_request, rerank_request
from .worker import QueueFull, Task, TooManyTokens, Worker

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PAGE = Path(__file__).with_name("page.html")
SHOWN = 12  # candidates that the page ranks by pairs; by items it ranks the catalogue
BODY_SECONDS = 30.0  # that a request's body may take to arrive
GONE = 499  # nginx's status for a client that closed its connection; nobody receives it


def _whole_number(text: str, most: int) -> int:
    """The number that ASCII digits write, at most `most`; -1 for other text."""
    if not (text.isascii() and text.isdigit()):
        return -1
    digits = text.lstrip("0") or "0"
    return min(int(digits), most) if len(digits) <= 18 else most


def _json_error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    kinds = {
        401: "unauthorized",
        408: "timeout",
        413: "too_large",
        415: "unsupported_media_type",
        429: "queue_full",
        503: "stopping",
    }
    kind = kinds.get(status, "invalid_request" if status < 500 else "internal_error")
    return JSONResponse({"error": {"type": kind, "code": status, "message": message}}, status, headers)


class Server:
    """The endpoints, with the worker that owns the model. `app` is the ASGI application."""

    def __init__(self, ranker: Ranker, worker: Worker, data: DataSet, settings: ServeSettings, key: str = ""):
        self.ranker, self.worker, self.data, self.settings, self.key = ranker, worker, data, settings, key
        self.counts: Counter[tuple[str, int]] = Counter()
        self.seconds: dict[str, float] = {}
        self.stopping = False
        guarded = [
            Route("/v1/rerank", self._guard(self.rerank), methods=["POST"]),
            Route("/v2/rerank", self._guard(self.rerank), methods=["POST"]),  # where Cohere's newer client looks
            Route("/rerank", self._guard(self.rerank), methods=["POST"]),
            Route("/v1/explain", self._guard(self.explain), methods=["POST"]),
            Route("/v1/items", self._guard(self.items), methods=["GET"]),
            Route("/metrics", self._guard(self.metrics), methods=["GET"]),
        ]
        open_to_all = [
            Route("/", self._guard(self.page, with_key=False), methods=["GET"]),
            Route("/healthz", self._guard(self.healthz, with_key=False), methods=["GET"]),
        ]
        self.app = Starlette(
            routes=[*guarded, *open_to_all],
            exception_handlers={404: self._not_found, 405: self._not_found},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        self.stopping = True
        await asyncio.to_thread(self.worker.close)

    async def _not_found(self, request: Request, error: Any) -> Response:
        known = "POST /v1/rerank, POST /v1/explain, GET /v1/items, /healthz, /metrics, /"
        return _json_error(
            error.status_code,
            f"{request.method} {request.url.path}: no such endpoint: known are {known}",
            dict(error.headers or {}),  # Allow
        )

    def _guard(
        self, endpoint: Callable[[Request], Awaitable[Response]], with_key: bool = True
    ) -> Callable[[Request], Awaitable[Response]]:
        """Counts, checks the key, and turns every error into JSON with its status."""

        async def guarded(request: Request) -> Response:
            started = time.perf_counter()
            response = await answer(request)
            path = request.url.path
            self.counts[path, response.status_code] += 1
            self.seconds[path] = self.seconds.get(path, 0.0) + time.perf_counter() - started
            response.headers["X-Content-Type-Options"] = "nosniff"
            response.headers["Cache-Control"] = "no-store"
            return response

        async def answer(request: Request) -> Response:
            try:
                host = re.sub(r":\d+$", "", request.headers.get("host", "")).strip("[]")
                if self.settings.host in LOOPBACK and host not in LOOPBACK:  # DNS rebinding
                    return _json_error(
                        400, "this server answers to 127.0.0.1 and localhost only: use one of them, or --host"
                    )
                if with_key and not self._has_key(request):
                    return _json_error(
                        401,
                        "the key is missing or wrong: send `Authorization: Bearer KEY`",
                        {"WWW-Authenticate": "Bearer"},
                    )
                return await endpoint(request)
            except Refused as refused:
                return _json_error(refused.status, str(refused))
            except TooManyTokens as error:
                return _json_error(413, f"{error}: send fewer or shorter titles")
            except QueueFull:
                return _json_error(429, "too many requests are waiting: try again in a second", {"Retry-After": "1"})
            except UserError as error:
                return _json_error(400, str(error))
            except ClientDisconnect:
                return Response(status_code=GONE)
            except Exception as error:
                console.notice(f"internal error in {request.url.path}: {type(error).__name__}: {error}")
                return _json_error(500, "internal error: see the server's terminal")

        return guarded

    def _has_key(self, request: Request) -> bool:
        if not self.key:
            return True
        given = request.headers.get("authorization", "")  # bytes, read as latin-1
        return hmac.compare_digest(given.encode("latin-1"), f"Bearer {self.key}".encode("utf-8", "surrogateescape"))

    async def _body(self, request: Request) -> Any:
        """The request's JSON. Raises Refused for another type, a body that is too large, and for what is not JSON."""
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":  # a form of another site's page cannot send this without asking
            raise Refused(415, "Content-Type must be application/json")
        limit = self.settings.max_body
        too_large = Refused(413, f"the body is larger than {limit:,} bytes: send fewer titles, or raise --max-body")
        length = request.headers.get("content-length", "")
        if _whole_number(length, limit + 1) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:  # else it would hold up the end of the server
            raise Refused(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds: send it again") from None
        try:
            return json.loads(
                bytes(body), parse_constant=lambda name: (_ for _ in ()).throw(ValueError(f"{name} is not JSON"))
            )
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON: {error}") from None

    async def _run(self, request: Request, task: Task) -> Any:
        """The task's result; a client that hangs up frees its place. Raises ClientDisconnect then."""
        self.worker.submit(task)
        result = asyncio.wrap_future(task.future)
        gone = asyncio.create_task(self._hung_up(request))
        try:
            await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not result.done():
                raise ClientDisconnect
            return result.result()
        finally:
            gone.cancel()
            if not result.done():
                self.worker.cancel(task)
                result.cancel()

    async def _hung_up(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def rerank(self, request: Request) -> Response:
        body = await self._body(request)
        query = await asyncio.to_thread(rerank_request, body, self.settings.max_items, self._match)
        task = Task(
            [*query.history, *query.titles], lambda ranker: ranker.job(query.history, dict.fromkeys(query.titles))
        )
        return JSONResponse(self._reranked(query, await self._run(request, task)))

    def _match(self, title: str) -> str:
        return self.data.catalogue.match(title)

    def _reranked(self, query: Rerank, found: Any) -> dict[str, Any]:
        return {
            "id": f"rerank-{time.time_ns():x}",
            "model": self.ranker.name,
            "object": "list",
            "results": query.results(found),
            "usage": {"total_tokens": found.tokens, "prompt_tokens": found.tokens},
            "meta": {"method": found.method, "prompt": found.prompt, "pairs_scored": found.pairs_scored},
        }

    async def explain(self, request: Request) -> Response:
        body = await self._body(request)
        query = await asyncio.to_thread(explain_request, body, self.settings.max_items, self._match)

        def run(ranker: Ranker) -> Any:
            return ranker.explain(
                query.history, query.chosen, query.rejected, max_flip=query.max_flip, between=task.raise_if_cancelled
            )

        task = Task([*query.history, query.chosen, query.rejected], run)
        found = await self._run(request, task)
        return JSONResponse(
            {"chosen": query.chosen, "rejected": query.rejected} | explanations.to_json([found]),
        )

    async def items(self, request: Request) -> Response:
        limit = request.query_params.get("limit", "20")
        number = _whole_number(limit, self.settings.max_items + 1)
        if not 1 <= number <= self.settings.max_items:
            raise Refused(400, f"limit: {limit[:20]!r} does not fit: give 1 to {self.settings.max_items}")
        query = request.query_params.get("q", "")[:200]
        found = await asyncio.to_thread(self.data.catalogue.search, query, number)
        return JSONResponse({"items": [{"title": t} for t in found], "total": len(self.data.catalogue.titles)})

    async def healthz(self, request: Request) -> Response:
        facts = {
            "status": "stopping" if self.stopping else "ok",
            "model": self.ranker.name,
            "method": self.ranker.method,
            "prompt": self.ranker.prompt,
            "items": len(self.data.catalogue.titles),
            "candidates": self._shown(),
            "waiting": self.worker.waiting,
            "running": self.worker.active,
        }
        return JSONResponse(facts, 503 if self.stopping else 200)

    def _shown(self) -> int:
        """How many candidates the page ranks."""
        every = min(len(self.data.catalogue.titles), self.settings.max_items - 50)
        return max(2, every) if self.ranker.method == "items" else SHOWN

    async def metrics(self, request: Request) -> Response:
        cost = self.ranker.scoring.cost
        lines = ["# TYPE mlx_dmpo_requests_total counter"]
        for (path, status), n in sorted(self.counts.items()):
            lines.append(f'mlx_dmpo_requests_total{{path="{path}",status="{status}"}} {n}')
        lines.append("# TYPE mlx_dmpo_request_seconds_total counter")
        for path, spent in sorted(self.seconds.items()):
            lines.append(f'mlx_dmpo_request_seconds_total{{path="{path}"}} {spent:.6f}')
        for name, kind, value in (
            ("requests_waiting", "gauge", self.worker.waiting),
            ("requests_running", "gauge", self.worker.active),
            ("tokens_total", "counter", cost.tokens),
            ("pairs_scored_total", "counter", cost.pairs),
            ("items_scored_total", "counter", cost.items),
            ("scores_from_cache_total", "counter", cost.kept),
        ):
            lines += [f"# TYPE mlx_dmpo_{name} {kind}", f"mlx_dmpo_{name} {value}"]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        html, policy = page()
        headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}
        return HTMLResponse(html, headers=headers)


def page() -> tuple[str, str]:
    """The page, and a content security policy that allows only its own script and style."""
    html = PAGE.read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in found)

    return html, (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UserError where the address is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except (OSError, UnicodeError) as error:
        found.close()
        raise UserError(
            f"--port: {host}:{port} cannot be listened on ({error}): give another --port or --host"
        ) from None
    found.listen(128)
    return found


def start(settings: ServeSettings) -> tuple[Server, Worker]:
    """The server with its model loaded. Raises UserError."""
    import_mlx_lm()
    data = read_data(settings.data, settings.domain, settings.domains)
    worker = Worker(
        lambda: Ranker.open(settings_for(settings), settings.adapter_path, data.domain),
        settings.max_queue,
        settings.max_request_tokens,
    )
    key = settings.api_key or os.environ.get("MLX_DMPO_API_KEY", "")
    return Server(worker.start(), worker, data, settings, key), worker


def run(settings: ServeSettings) -> None:
    """Serves until SIGINT or SIGTERM; then answers what waits, and raises Interrupted."""
    with listen(settings.host, settings.port) as listening, memory.memory_limits(settings):
        server, _ = start(settings)
        host, port = listening.getsockname()[:2]
        if settings.host not in LOOPBACK and not server.key:
            console.notice(f"note: anyone who can reach {host} can use this server: add --api-key")
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {console.printable(server.ranker.name)} on http://{shown}:{port} (Ctrl-C stops it)", flush=True)

        def stopped(number: int, frame: FrameType | None) -> None:
            raise Interrupted("stopped; every accepted request was answered", number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, stopped)
        config = uvicorn.Config(
            server.app, log_level="warning", lifespan="on", server_header=False, timeout_keep_alive=5, ws="none"
        )
        uvicorn.Server(config).run(sockets=[listening])  # it ends by raising the signal that it received
