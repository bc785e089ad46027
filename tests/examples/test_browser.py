"""The page in the browser: in headless Chromium, the pixels, exits and predictions of Python."""

import functools
import http.server
import json
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from hf_selfkd import ExitPolicy, MultiExitForImageClassification, export_early_exit
from tests.helpers.models import build_copy

EXAMPLES = Path(__file__).parents[2] / "examples"
NODE_MODULES = EXAMPLES / "browser" / "node_modules"
NAMES = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)

needs_a_browser = pytest.mark.skipif(
    not (CHROMIUM and shutil.which("node") and (NODE_MODULES / "playwright-core").exists()),
    reason="needs Chromium, Node.js and npm install --prefix examples/browser",
)


@pytest.fixture(scope="module")
def examples():
    """Return the modules of the page's script and of the runner in Python."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES / "serve")
        patch.syspath_prepend(EXAMPLES / "browser")
        import early_exit_model
        import prepare

        yield prepare, early_exit_model


def drive(page: Path, files: list[Path], bad: Path) -> dict:
    """Serve the page, open the files in it one by one, and return what it shows."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=page)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = ["node", Path(__file__).with_name("browser.mjs"), CHROMIUM, f"http://127.0.0.1:{server.server_port}"]
        text = json.dumps({"files": [str(file) for file in files], "bad": str(bad)})
        run = subprocess.run(command, input=text, capture_output=True, text=True)
        server.shutdown()
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def write_photographs(folder: Path, count: int) -> list[Path]:
    """Cut photographs of many sizes, as JPEG and PNG, most turned by EXIF, one grey, one with a palette."""
    draw = np.random.default_rng(0)
    scenes = [Image.fromarray(scene) for scene in load_sample_images().images]
    files = []
    for index in range(count):
        scene = scenes[index % 2]
        width, height = draw.integers(150, 270, 2).tolist()
        left, top = int(draw.integers(scene.width - width)), int(draw.integers(scene.height - height))
        photograph = scene.crop((left, top, left + width, top + height))
        exif = Image.Exif()
        exif[0x0112] = 1 + index % 8  # orientation
        files.append(folder / f"{index}.{'jpg' if index % 3 else 'png'}")
        photograph.convert({0: "L", 3: "P"}.get(index, "RGB")).save(files[-1], quality=90, exif=exif)
    return files


def stopping_at(runner, exit: int) -> list[float]:
    """Return thresholds with which every image stops at an exit."""
    return [2.0] * exit + [0.0] * (runner.num_exits - 1 - exit)


def spread(runner, inputs: np.ndarray) -> list[float]:
    """Return thresholds that spread images over all exits, each in the widest gap of scores near the one wanted."""
    thresholds = []
    for exit in range(runner.num_exits - 1):
        _, scores, _ = runner.predict(inputs, stopping_at(runner, exit))
        ordered = np.sort(scores)[::-1]
        share = len(inputs) // (runner.num_exits - exit)
        place = share - 2 + int(np.diff(ordered)[share - 2 : share + 1].argmin())
        thresholds.append(float(ordered[place : place + 2].mean()))
        inputs = inputs[scores < thresholds[-1]]
    return thresholds


@pytest.mark.slow
@needs_a_browser
def test_the_page_stops_where_python_does(examples, tmp_path):
    prepare, early_exit_model = examples
    model = build_copy(MultiExitForImageClassification, "test_resnet", num_labels=5).eval()
    model.config.pretrained_cfg |= {"input_size": [3, 64, 64], "crop_pct": 0.9, "interpolation": "bicubic"}
    policy = ExitPolicy(thresholds=[0.5] * (model.num_exits - 1))
    runner = early_exit_model.EarlyExitModel(export_early_exit(model, tmp_path / "exits.onnx", policy))
    files = write_photographs(tmp_path, 24)
    prepare.prepare(tmp_path / "exits.onnx", tmp_path / "page", files[:1])

    inputs = np.stack([runner.preprocess(Image.open(file)) for file in files])
    thresholds = spread(runner, inputs)
    config = json.loads((tmp_path / "page" / "model.json").read_text())
    (tmp_path / "page" / "model.json").write_text(json.dumps(config | {"thresholds": thresholds}))
    _, _, exits = runner.predict(inputs, thresholds)
    assert set(exits.tolist()) == set(range(runner.num_exits))
    expected = [runner.predict(inputs, stopping_at(runner, exit))[:2] for exit in range(runner.num_exits)]

    (tmp_path / "bad.jpg").write_bytes(b"no image")
    shown = drive(tmp_path / "page", files, tmp_path / "bad.jpg")
    for index, found in enumerate(shown["found"]):
        pixels = np.array(found["pixels"], dtype=np.float32).reshape(inputs[index].shape)
        np.testing.assert_allclose(pixels, inputs[index], atol=1e-5, err_msg=found["file"])
        states = [row["state"] for row in found["rows"]]
        taken = int(exits[index])
        assert states == ["passed"] * taken + ["taken"] + ["unreached"] * (runner.num_exits - 1 - taken)
        for row, (classes, confidences) in zip(found["rows"][: taken + 1], expected, strict=False):
            assert row["label"] == runner.labels[classes[index]]
            assert row["confidence"] == pytest.approx(confidences[index], abs=6e-4)  # shown to a tenth of a percent
        assert min(found["times"]) > 0
    assert shown["dropped"] == shown["clicked"] == shown["found"][0]["rows"]
    assert shown["lowest"][0]["state"] == shown["highest"][-1]["state"] == "taken"
    assert shown["error"] == "The browser cannot read this file as an image."
    assert shown["problems"] == []


def test_a_model_that_the_page_cannot_show_is_refused(examples, tmp_path, monkeypatch):
    prepare, _ = examples
    path, page = tmp_path / "exits.onnx", tmp_path / "page"
    thresholds = onnx.helper.make_tensor("thresholds", onnx.TensorProto.FLOAT, [1], [0.5])
    model = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [], [thresholds]))

    def refusal(error, **texts):
        onnx.helper.set_model_props(model, {name: json.dumps(text) for name, text in texts.items()})
        onnx.save(model, path)
        with pytest.raises(error) as raised:
            prepare.prepare(path, page)
        assert not page.exists()
        return str(raised.value)

    assert "was not written by export_early_exit" in refusal(ValueError, labels=["a"])
    texts = {"thresholds": [0.5], "interpolation": "bicubic", "crop_mode": "center"}
    assert "has 'nearest'" in refusal(ValueError, **texts | {"interpolation": "nearest"})
    assert "has 'border'" in refusal(ValueError, **texts | {"crop_mode": "border"})
    monkeypatch.setattr(prepare, "HERE", tmp_path)
    assert "Run npm install" in refusal(FileNotFoundError, **texts)
    (tmp_path / "exits.onnx.data").touch()
    assert "too large for a browser" in refusal(ValueError, **texts)
