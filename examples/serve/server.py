"""An HTTP server for a model from `export_early_exit`, without torch. Needs `pip install "hf_selfkd[serve]"`.

python examples/serve/server.py exits.onnx --port 8000
curl --data-binary @photo.jpg "http://localhost:8000/classify?thresholds=0.9,0.9,0.9"
"""

import argparse
import asyncio
import io
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from early_exit_model import EarlyExitModel
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import PlainTextResponse
from PIL import Image

# The check for drift needs the standard library only, unlike the package that it is part of. In the Docker image it
# lies beside this file.
sys.path.append(str(Path(__file__).parent.parent.parent / "hf_selfkd" / "deploy"))
from exit_counter import ExitCounter  # noqa: E402


@dataclass(kw_only=True)
class Limits:
    """What one request, or all at once, may ask for.

    Args:
        body_bytes: Size of an image file.
        pixels: Width times height of an image, known before it is decoded.
        body_seconds: Time in which a client must have sent its body.
        waiting: Images that may wait for their batch; further requests are refused.
        batch: Images that run at once.
        wait_seconds: Time that an image waits for others to fill its batch.
    """

    body_bytes: int = 10_000_000
    pixels: int = 50_000_000
    body_seconds: float = 10.0
    waiting: int = 256
    batch: int = 16
    wait_seconds: float = 0.002


@dataclass
class Counts:
    """What `/metrics` reports."""

    exits: Counter = field(default_factory=Counter)
    default_exits: Counter = field(default_factory=Counter)  # of images with the thresholds of the file
    statuses: Counter = field(default_factory=Counter)
    batches: int = 0
    model_seconds: float = 0.0


class Batcher:
    """Runs images of different requests as one batch; those that bring the same thresholds share one.

    Args:
        model: The model.
        limits: Sizes and times.
        counts: Counts batches and exits.
    """

    def __init__(self, model: EarlyExitModel, limits: Limits, counts: Counts):
        self.model = model
        self.limits = limits
        self.counts = counts
        self.waiting: asyncio.Queue = asyncio.Queue(limits.waiting)

    async def classify(self, pixel_values: np.ndarray, thresholds: tuple[float, ...]) -> tuple[int, float, int]:
        """Return class index, confidence and exit of one image.

        Raises:
            HTTPException: With status 503, if too many images wait.
        """
        result = asyncio.get_running_loop().create_future()
        try:
            self.waiting.put_nowait((pixel_values, thresholds, result))
        except asyncio.QueueFull as error:
            raise HTTPException(503, f"{self.limits.waiting} images are waiting. Try again later.") from error
        return await result

    async def run(self) -> None:
        """Run batch after batch, forever."""
        while True:
            by_thresholds: dict[tuple[float, ...], list] = {}
            for pixel_values, thresholds, result in await self._next_batch():
                by_thresholds.setdefault(thresholds, []).append((pixel_values, result))
            for thresholds, group in by_thresholds.items():
                await self._run_group(thresholds, group)

    async def _next_batch(self) -> list:
        batch = [await self.waiting.get()]
        deadline = time.monotonic() + self.limits.wait_seconds
        while len(batch) < self.limits.batch:
            try:
                batch.append(await asyncio.wait_for(self.waiting.get(), deadline - time.monotonic()))
            except asyncio.TimeoutError:
                break
        return batch

    async def _run_group(self, thresholds: tuple[float, ...], group: list) -> None:
        images, results = zip(*group, strict=True)
        start = time.perf_counter()
        try:
            found = await asyncio.to_thread(self.model.predict, np.stack(images), thresholds)
        except Exception as error:  # of any kind: the clients must get an error, and the server must live on
            for result in results:
                if not result.done():
                    result.set_exception(HTTPException(500, f"The model failed: {error}"))
            return
        self.counts.model_seconds += time.perf_counter() - start
        self.counts.batches += 1
        for result, index, confidence, exit in zip(results, *(part.tolist() for part in found), strict=True):
            self.counts.exits[exit] += 1
            self.counts.default_exits[exit] += thresholds == tuple(self.model.thresholds)
            if not result.done():  # the client may have gone
                result.set_result((index, confidence, exit))


async def read_body(request: Request, limits: Limits) -> bytes:
    """Read the body of a request.

    Raises:
        HTTPException: With status 413 if it is too large, 408 if it comes too slowly.
    """

    async def read() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limits.body_bytes:
                raise HTTPException(413, f"The image file has more than {limits.body_bytes:,} bytes.")
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), limits.body_seconds)
    except asyncio.TimeoutError as error:
        raise HTTPException(408, f"The body did not arrive within {limits.body_seconds:g} seconds.") from error


def decode(model: EarlyExitModel, body: bytes, limits: Limits) -> np.ndarray:
    """Decode and preprocess an image.

    Raises:
        HTTPException: With status 400 if it is no image, 413 if it has too many pixels.
    """
    try:
        with Image.open(io.BytesIO(body)) as image:
            if image.width * image.height > limits.pixels:
                raise HTTPException(413, f"{image.width}x{image.height} pixels are more than {limits.pixels:,}.")
            return model.preprocess(image)
    except HTTPException:
        raise
    except Image.DecompressionBombError as error:
        raise HTTPException(413, str(error)) from error
    except Exception as error:  # Pillow's decoders raise all kinds
        raise HTTPException(400, f"The body is not a readable image ({error}).") from error


def create_app(model: EarlyExitModel, limits: Limits) -> FastAPI:
    """Create the application: `/classify`, `/metrics` and `/health`."""
    counts = Counts()
    batcher = Batcher(model, limits, counts)

    async def lifespan(app: FastAPI):
        task = asyncio.create_task(batcher.run())
        yield
        task.cancel()

    app = FastAPI(title="Early exit", lifespan=lifespan)

    @app.middleware("http")
    async def count(request: Request, call_next: Any) -> Any:
        response = await call_next(request)
        if request.url.path == "/classify":
            counts.statuses[response.status_code] += 1
        return response

    @app.post("/classify")
    async def classify(request: Request, thresholds: str | None = None) -> dict[str, Any]:
        wanted = parse_thresholds(model, thresholds)
        body = await read_body(request, limits)
        pixel_values = await asyncio.to_thread(decode, model, body, limits)
        index, confidence, exit = await batcher.classify(pixel_values, wanted)
        return {"label": model.labels[index], "index": index, "confidence": confidence, "exit": exit}

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        return write_metrics(model, counts)

    return app


def parse_thresholds(model: EarlyExitModel, text: str | None) -> tuple[float, ...]:
    """Read comma-separated thresholds; ``None`` gives those of the file.

    Raises:
        HTTPException: With status 400 if they are not those that the model needs.
    """
    if text is None:
        return tuple(model.thresholds)
    try:
        return tuple(model.check_thresholds([float(part) for part in text.split(",")]).tolist())
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


def write_metrics(model: EarlyExitModel, counts: Counts) -> str:
    """Write the counts in the text format of Prometheus."""
    families = {
        ("early_exit_images_total", "counter", "Images by the exit that they took."): {
            f'{{exit="{exit}"}}': counts.exits[exit] for exit in range(model.num_exits)
        },
        ("early_exit_requests_total", "counter", "Requests by status."): {
            f'{{status="{status}"}}': number for status, number in sorted(counts.statuses.items())
        },
        ("early_exit_batches_total", "counter", "Batches that ran."): {"": counts.batches},
        ("early_exit_model_seconds_total", "counter", "Seconds that the model ran."): {"": counts.model_seconds},
    }
    lines = []
    for (name, kind, description), values in families.items():
        lines += [f"# HELP {name} {description}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{labels} {value}" for labels, value in values.items()]
    return "\n".join(lines + write_drift(model, counts)) + "\n"


def write_drift(model: EarlyExitModel, counts: Counts) -> list[str]:
    """Write whether the images exit where those of the calibration did; nothing if the file does not hold that.

    Images that brought thresholds of their own are not counted.
    """
    if model.exit_counts is None:
        return []
    counter = ExitCounter(model.exit_counts)
    counter.add([counts.default_exits[exit] for exit in range(model.num_exits)])
    lines = [
        "# HELP early_exit_drift_e_value Evidence that more or fewer images exit up to here than in calibration.",
        "# TYPE early_exit_drift_e_value gauge",
        *(f'early_exit_drift_e_value{{exit="{exit}"}} {value}' for exit, value in enumerate(counter.e_values)),
        "# HELP early_exit_drifted Whether the evidence suffices, with one false alarm in a hundred servers.",
        "# TYPE early_exit_drifted gauge",
    ]
    return [*lines, f"early_exit_drifted {int(counter.has_drifted)}"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the ONNX file")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=0, help="of the model; 0: all cores")
    for name, limit in vars(Limits()).items():
        parser.add_argument(f"--{name}", type=type(limit), default=limit)
    options = parser.parse_args(argv)
    limits = Limits(**{name: getattr(options, name) for name in vars(Limits())})
    app = create_app(EarlyExitModel(options.model, options.threads), limits)
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
