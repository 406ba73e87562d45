"""The application: paths, and what happens to a request between its body and its answer."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
import jax
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

import alto_jax
from alto_jax.inference.streaming import Grown
from alto_jax.serve import schema, work
from alto_jax.serve.batcher import Batcher, Job
from alto_jax.serve.guard import Guard
from alto_jax.serve.limits import FAULTS, Fault, Limits
from alto_jax.serve.metrics import Metrics
from alto_jax.serve.schema import ErrorResponse, ModelResponse, Options, SegmentRequest, SegmentResponse

_log = logging.getLogger(__name__)


class Service:
    """A model's service.

    Attributes:
      app: the ASGI application. guard: its outermost layer. batcher: the queue and the model's thread.
    """

    def __init__(
        self,
        batcher: Batcher,
        name: str,
        limits: Limits,
        *,
        keys: tuple[bytes, ...] = (),
        cors: tuple[str, ...] = (),
        threads: int | None = None,
        on_state: Callable[[str], None] = lambda state: None,
    ):
        """Takes the queue; a name for the model; limits; API keys; origins that browsers may ask from; threads that
        decode images and write answers; and who hears of "ready" and "failed"."""
        self.batcher, self.name, self.limits, self._on_state = batcher, name, limits, on_state
        self.guard = Guard(limits, keys, lambda: batcher.state == "ready")
        sizes = batcher.engine.sizes
        self.metrics = Metrics(sizes, lambda: batcher.depth, lambda: self.guard.in_flight)
        self.guard.metrics = batcher.metrics = self.metrics
        threads = threads or min(4, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="alto-work")
        routes = self._routes()
        self.guard.app = routes
        self.openapi = routes.openapi
        self.app: Any = self.guard
        if cors:
            headers = ["authorization", "content-type", "x-api-key"]
            self.app = CORSMiddleware(self.guard, list(cors), allow_methods=["GET", "POST"], allow_headers=headers)

    async def _in_thread(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, functools.partial(call, *args, **kwargs))

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.batcher.start(self._on_state)
        yield
        await asyncio.to_thread(self.batcher.stop)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _routes(self) -> FastAPI:
        """The paths."""
        app = FastAPI(title="alto_jax", version=alto_jax.__version__, lifespan=self._lifespan, docs_url=None,
                      redoc_url=None, description="Segmentation by phrases and boxes, with masks of as many tokens as "
                      "they need.")  # fmt: skip
        told: dict[int, list[str]] = {}
        for code, (status, when) in FAULTS.items():
            told.setdefault(status, []).append(f"{code}: {when}")
        faults: dict[int | str, dict[str, Any]] = {
            status: {"model": ErrorResponse, "description": "; ".join(lines)}
            for status, lines in told.items()
            if status not in (404, 405, 499)
        }
        events = {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
        body = {"requestBody": {"required": True, "content": _bodies()}}
        post = functools.partial(app.post, tags=["masks"], openapi_extra=body)

        @post("/v1/segment", responses={200: {"model": SegmentResponse}, **faults}, summary="Masks of an image")
        async def segment(request: Request) -> Response:
            return await self._answered(request, self._segment)

        @post("/v1/segment/stream", responses={200: events, **faults}, response_class=Response,
              summary="Masks token by token, as server-sent events: token …, answer")  # fmt: skip
        async def stream(request: Request) -> Response:
            return await self._answered(request, self._stream)

        @app.get("/v1/model", tags=["service"], response_model=ModelResponse, summary="What answers, and its limits")
        async def model() -> dict[str, Any]:
            return self._model()

        @app.get("/healthz", tags=["service"], summary="Whether the process works")
        async def health() -> Response:
            works = self.batcher.is_alive
            return JSONResponse({"status": "ok" if works else "failed"}, 200 if works else 503)

        @app.get("/readyz", tags=["service"], summary="Whether it takes requests: compiled, and not ending")
        async def ready() -> Response:
            state = "draining" if self.guard.draining else self.batcher.state
            return JSONResponse({"status": state}, 200 if state == "ready" else 503)

        @app.get("/metrics", tags=["service"], summary="Counters for Prometheus")
        async def metrics() -> Response:
            return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

        @app.exception_handler(HTTPException)
        async def http_fault(request: Request, error: HTTPException) -> Response:
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
            known = {"not_found": f"no such path: {request.url.path[:80]}",
                     "method_not_allowed": f"{request.method} is no method of {request.url.path[:80]}"}  # fmt: skip
            return self._told(Fault(code, known.get(code, str(error.detail)), headers=dict(error.headers or {})))

        @app.exception_handler(Fault)
        async def fault(request: Request, error: Fault) -> Response:
            return self._told(error)

        @app.exception_handler(Exception)
        async def failure(request: Request, error: Exception) -> Response:
            return self._told(Fault("internal", "the service failed to answer; its log has the trace"))

        app.openapi = functools.partial(_openapi, app)  # type: ignore[method-assign]
        return app

    def _told(self, fault: Fault) -> Response:
        self.metrics.faults.labels(fault.code).inc()
        # Note: in ASCII, since a field may have half a character as its name.
        return Response(json.dumps(fault.body()), fault.status, fault.headers, "application/json")

    async def _answered(
        self,
        request: Request,
        answer: Callable[[bytes, Options, float, contextlib.AsyncExitStack], Awaitable[Response]],
    ) -> Response:
        """Reads a request, and answers it within the time, unless its client goes away before."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in ("application/json", "multipart/form-data"):
            told = f"content-type: expected application/json or multipart/form-data, got {schema.shown(kind)}"
            raise Fault("unsupported_media_type", told)
        bodies = self.guard.bodies
        content = await bodies.read(request.scope, request.receive)
        began = time.monotonic()
        main: asyncio.Task[Response] | None = None
        stack = contextlib.AsyncExitStack()
        stack.callback(bodies.release, len(content))  # Note: a stream holds its picture to its end.
        try:
            async with stack, asyncio.timeout(self.limits.request_seconds):
                image, asked = await (self._in_thread(work.parse_json, content) if kind == "application/json"
                                      else _parse_form(request, content, self.limits))  # fmt: skip
                del content
                main = asyncio.create_task(answer(image, asked, began, stack))  # type: ignore[arg-type]
                gone = asyncio.create_task(_disconnected(request))
                try:
                    await asyncio.wait({main, gone}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    gone.cancel()
                if not main.done():
                    raise Fault("client_closed", "the client went away before its answer")
                response = main.result()
                if isinstance(response, _Events):  # Note: what it holds is given back when all of it is sent.
                    response.held = stack.pop_all()
                return response
        except TimeoutError as error:
            told = f"no answer within {self.limits.request_seconds:g} s"
            raise Fault("timeout", told, headers={"retry-after": "5"}) from error
        finally:
            if main is not None and not main.done():
                main.cancel()

    @contextlib.asynccontextmanager
    async def _submitted(
        self, image: bytes, asked: Options, listener: Callable[[int, Grown], None] | None = None
    ) -> AsyncIterator[Job]:
        """The job of a request, in the queue; its places there are held meanwhile."""
        count = len(work.requests_of(asked, self.limits)) or 1
        wait = self.batcher.reserve(count)
        if wait is not None:
            told = f"{self.batcher.depth} masks wait, at most {self.limits.max_queue} may; ask again"
            raise Fault("busy", told, headers={"retry-after": str(math.ceil(wait))})
        job = None
        try:
            job = await self._in_thread(work.prepare, self.batcher.engine, self.limits, image, asked, listener)
            self.batcher.submit(job)
            yield job
        finally:
            if job is not None:
                job.give_up()
            self.batcher.release(count)

    async def _segment(self, image: bytes, asked: Options, began: float, held: contextlib.AsyncExitStack) -> Response:
        async with self._submitted(image, asked) as job:
            await asyncio.wrap_future(job.future)
        seconds = time.monotonic() - began
        found = await self._in_thread(work.finish, self.name, self.limits, job, image, asked, seconds)
        return Response(found, media_type="application/json")

    async def _stream(self, image: bytes, asked: Options, began: float, held: contextlib.AsyncExitStack) -> Response:
        """Begins with the first token; what fails before it is a fault of its own status."""
        loop, told = asyncio.get_running_loop(), asyncio.Queue()  # type: ignore[var-annotated]

        def tell(event: tuple[int, Grown] | None) -> None:
            with contextlib.suppress(RuntimeError):  # the service has ended
                loop.call_soon_threadsafe(told.put_nowait, event)

        listener = lambda index, grown: tell((index, grown))
        job = await held.enter_async_context(self._submitted(image, asked, listener))
        job.future.add_done_callback(lambda _: tell(None))
        first = await told.get()
        if first is None:
            await asyncio.wrap_future(job.future)
        return _Events(self._events(job, first, told, image, asked, began), media_type="text/event-stream",
                       headers={"cache-control": "no-store", "x-accel-buffering": "no"})  # fmt: skip

    async def _events(
        self, job: Job, event: tuple[int, Grown] | None, told: asyncio.Queue, image: bytes, asked: Options, began: float
    ) -> AsyncIterator[bytes]:
        """Server-sent events: a "token" for each mask token, the first one given, then the "answer"; or an "error"."""
        size, masks = job.inputs.size, {}  # type: ignore[var-annotated]
        try:
            async with asyncio.timeout(max(0.0, began + self.limits.request_seconds - time.monotonic())):
                while event is not None:
                    index, grown = event
                    data, masks[index] = await self._in_thread(work.grow, size, index, grown, masks.get(index), asked)
                    yield b"event: token\ndata: " + data + b"\n\n"
                    event = await told.get()
                await asyncio.wrap_future(job.future)
                seconds = time.monotonic() - began
                done = await self._in_thread(work.finish, self.name, self.limits, job, image, asked, seconds)
                yield b"event: answer\ndata: " + done + b"\n\n"
                return
        except TimeoutError:
            fault = Fault("timeout", f"not all was sent within {self.limits.request_seconds:g} s")
        except Exception:
            # Note: the model and the drawing of masks raise nearly anything. The status was sent before, so the client
            # is told by an event, the log has the trace, and the metrics count a fault.
            _log.exception("a stream failed after its first token")
            fault = Fault("internal", "the service failed to answer; its log has the trace")
        self.metrics.faults.labels(fault.code).inc()
        yield b"event: error\ndata: " + JSONResponse(fault.body()).body + b"\n\n"

    def _model(self) -> dict[str, Any]:
        engine = self.batcher.engine
        tokenizer = engine.model.cfg.tokenizer
        return {
            "name": self.name, "version": alto_jax.__version__, "device": engine.device,
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(engine.model.params)),
            "mask_tokens": tokenizer.num_latent_tokens, "codebook_size": tokenizer.codebook_size,
            "image_size": engine.model.cfg.need_vision().image_size, "batch_sizes": list(engine.sizes),
            "question_buckets": list(engine.widths),
            "limits": dataclasses.asdict(self.limits),
        }  # fmt: skip


class _Events(StreamingResponse):
    """A stream that gives back, however it ends, what it `held`."""

    held: contextlib.AsyncExitStack | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self.held is not None:
                await self.held.aclose()


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Form(MultiPartParser):
    """A form's parts stay in memory, which the limits of bodies bound; `is_whole`: its end was there."""

    spool_max_size = 1 << 40
    is_whole = False

    def on_end(self) -> None:
        self.is_whole = True


async def _parse_form(request: Request, content: bytes, limits: Limits) -> tuple[bytes, Options]:
    """A multipart body as (the image file's bytes, what is asked).

    Raises:
      Fault: bad_multipart, invalid_field.
    """

    async def stream() -> AsyncIterator[bytes]:
        yield content

    most = limits.max_phrases + 16
    _, options = parse_options_header(request.headers["content-type"])
    try:
        # Note: of the header's options the boundary alone; text is UTF-8, and in no codec that a client names.
        kind = Headers(raw=[(b"content-type", b'multipart/form-data; boundary="' + options[b"boundary"] + b'"')])
        parser = _Form(kind, stream(), max_files=1, max_fields=most, max_part_size=1 << 16)  # type: ignore[arg-type]
        form = await parser.parse()
        if not parser.is_whole:  # Note: the parser takes a form that is cut off.
            raise MultiPartException("its end is missing")
    except (MultiPartException, KeyError, ValueError, UnicodeError, LookupError) as error:
        told = "no boundary" if isinstance(error, KeyError) else getattr(error, "message", str(error))
        raise Fault("bad_multipart", f"the body is no multipart form: {told:.200}") from error
    fields, image = [], None
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name != "image":
                told = f"{schema.shown(name)}: unexpected file; the file is 'image'"
                raise Fault("invalid_field", told, name[:80])
            image = await value.read()
        elif name == "image":
            raise Fault("invalid_field", "image: expected a file, got text", "image")
        else:
            fields.append((name, value))
    await form.close()
    asked = schema.check(Options, schema.from_form(fields))
    if image is None:
        raise Fault("invalid_field", "image: the field is missing", "image")
    return image, asked


def _bodies() -> dict[str, Any]:
    """The two kinds of body, for the OpenAPI schema."""
    return {
        "application/json": {
            "schema": {"$ref": "#/components/schemas/SegmentRequest"},
            "examples": {
                "phrase": {"value": {"image": "iVBORw0KGgo=", "phrase": "the red apple"}},
                "phrases": {"value": {"image": "iVBORw0KGgo=", "phrases": ["the red apple", "the cup"], "length": 8}},
                "boxes": {"value": {"image": "iVBORw0KGgo=", "boxes": [[12, 30, 55, 80]], "returns": ["png"]}},
            },
        },
        "multipart/form-data": {"schema": {"$ref": "#/components/schemas/SegmentForm"}},
    }


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The schema, with the requests that are read by hand."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        schemas = found.setdefault("components", {}).setdefault("schemas", {})
        asked = SegmentRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= asked.pop("$defs", {})
        schemas["SegmentRequest"] = asked
        form = Options.model_json_schema()
        properties = form["properties"] | {"image": {"type": "string", "format": "binary"}}
        properties["boxes"] = {"type": "string", "description": "As JSON: [[x1, y1, x2, y2], …]"}
        schemas["SegmentForm"] = form | {"title": "SegmentForm", "properties": properties, "required": ["image"]}
        schemes = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        found["components"]["securitySchemes"] = schemes
        found["security"] = [{}, {"bearer": []}, {"key": []}]
        app.openapi_schema = found
    return app.openapi_schema
