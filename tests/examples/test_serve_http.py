"""The HTTP server: a real client against a running process."""

import io
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hf_selfkd import ExitPolicy, MultiExitForImageClassification, export_early_exit
from tests.helpers.models import build_copy
from tests.helpers.processes import free_port

pytest.importorskip("fastapi")
pytestmark = pytest.mark.slow
SERVER = Path(__file__).parents[2] / "examples" / "serve" / "server.py"
MEAN, STD = 0.5, 0.25


def encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def model():
    model = build_copy(MultiExitForImageClassification, "test_resnet", num_labels=5, exits=[0, 2]).eval()
    data = {"input_size": [3, 32, 32], "crop_pct": 1.0, "mean": [MEAN] * 3, "std": [STD] * 3}
    model.config.pretrained_cfg |= data
    return model


@pytest.fixture(scope="module")
def photographs():
    draw = np.random.default_rng(0)
    return [draw.integers(0, 1 + 255 * (index + 1) // 50, (32, 32, 3), dtype=np.uint8) for index in range(50)]


@pytest.fixture(scope="module")
def expected(model, photographs):
    """Return the policy, and what the model predicts for every photograph by it and with two other thresholds."""
    images = (torch.from_numpy(np.stack(photographs)).permute(0, 3, 1, 2) / 255 - MEAN) / STD
    with torch.no_grad():
        logits = model(images).exit_logits
    first, second = (exit_logits.softmax(dim=1).amax(dim=1).sort().values for exit_logits in logits[:2])
    policy = ExitPolicy(thresholds=[first[30:32].mean().item(), second[15:17].mean().item()])
    other = ExitPolicy(thresholds=[first[10:12].mean().item(), second[15:17].mean().item()])
    return policy, model.early_exit(images, policy), other, model.early_exit(images, other)


@pytest.fixture(scope="module")
def url(model, expected, tmp_path_factory):
    file = tmp_path_factory.mktemp("server") / "exits.onnx"
    export_early_exit(model, file, replace(expected[0], calibration={"exit_counts": [100, 100, 100]}))
    port = free_port()
    limits = ["--body_bytes", "200000", "--pixels", "100000", "--body_seconds", "1", "--threads", "1"]
    process = subprocess.Popen([sys.executable, SERVER, file, "--port", str(port), *limits])
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{address}/health").close()
                break
            except urllib.error.URLError:
                assert process.poll() is None
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def ask(url: str, body: bytes, query: str = "") -> dict:
    with urllib.request.urlopen(f"{url}/classify{query}", data=body, timeout=60) as response:
        return json.load(response)


def status(url: str, body: bytes, query: str = "") -> tuple[int, str]:
    with pytest.raises(urllib.error.HTTPError) as error:
        ask(url, body, query)
    return error.value.code, error.value.read().decode()


def exits(url: str) -> list[int]:
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    return [int(number) for number in re.findall(r'images_total\{exit="\d"\} (\d+)', text)]


def drift(url: str) -> tuple[float, int]:
    """Return the e-value of the first exit, and whether the exits have drifted."""
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    (e_value,) = re.findall(r'drift_e_value\{exit="0"\} (\S+)', text)
    (drifted,) = re.findall(r"^early_exit_drifted (\d)", text, flags=re.MULTILINE)
    return float(e_value), int(drifted)


def test_a_thousand_requests_sixteen_at_once_are_neither_lost_nor_mixed_up(url, photographs, expected):
    policy, by_default, other, by_other = expected
    query = "?thresholds=" + ",".join(map(repr, other.thresholds))
    bodies = [encode(photograph) for photograph in photographs]
    before = exits(url)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda index: ask(url, bodies[index % 50], query * (index % 2)), range(1000)))
    for index, prediction in enumerate(found):
        wanted = by_other if index % 2 else by_default
        assert prediction["exit"] == wanted.exit_index[index % 50]
        assert prediction["index"] == wanted.logits[index % 50].argmax()
        assert prediction["confidence"] == pytest.approx(wanted.confidence[index % 50].item(), abs=1e-4)
    taken = [sum(prediction["exit"] == exit for prediction in found) for exit in range(3)]
    assert min(taken) > 0
    assert [after - count for after, count in zip(exits(url), before, strict=True)] == taken


def test_drift_is_reported_without_images_that_brought_thresholds(url, photographs, expected):
    policy, by_default, other, _ = expected
    before = drift(url)
    certain = next(index for index, exit in enumerate(by_default.exit_index) if exit == 0)
    body = encode(photographs[certain])
    query = "?thresholds=" + ",".join(map(repr, other.thresholds))
    for _ in range(20):
        ask(url, body, query)
    assert drift(url) == before
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: ask(url, body), range(1500)))
    assert drift(url)[1] == 1  # all exit at the first exit, as a third of the calibration images did


def test_bad_requests_are_refused(url, photographs):
    code, text = status(url, b"no image")
    assert code == 400 and "not a readable image" in text
    code, text = status(url, encode(photographs[0]), "?thresholds=0.5")
    assert code == 400 and "needs 2 thresholds" in text
    assert status(url, encode(photographs[0]), "?thresholds=a,b")[0] == 400
    code, text = status(url, encode(np.zeros((400, 400, 3), dtype=np.uint8)))
    assert code == 413 and "400x400 pixels are more than 100,000" in text
    assert status(url, bytes(300_000))[0] == 413


def test_a_slow_client_gets_an_error_and_others_are_served(url, photographs, expected):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as slow:
        slow.sendall(b"POST /classify HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\nhalf")
        assert ask(url, encode(photographs[0]))["exit"] == expected[1].exit_index[0]
        slow.settimeout(30)
        assert b" 408 " in slow.recv(1000)
    assert ask(url, encode(photographs[1]))["exit"] == expected[1].exit_index[1]
