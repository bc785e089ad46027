"""Load checkpoints where only torch, timm and transformers are installed: run by test_without_library.py.

Arguments: the repository of a classifier, that of a segmentation model, and a folder with images.pt and photo.png,
into which results.pt and a copy of the classifier are written.
"""

import os
import sys
from pathlib import Path

for name in ("hf_selfkd", "accelerate", "datasets", "evaluate", "matplotlib", "peft", "pandas", "scipy", "sklearn"):
    sys.modules[name] = None  # cannot be imported

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    pipeline,
)

classifier, segmenter, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
images = torch.load(folder / "images.pt")
photo = str(folder / "photo.png")
results = {}

for loader, repository in (
    (AutoModelForImageClassification, classifier),
    (AutoModelForSemanticSegmentation, segmenter),
):
    try:
        loader.from_pretrained(repository, trust_remote_code=False)
    except ValueError as error:
        results.setdefault("refusals", []).append(str(error))
results["ran_before_trust"] = [str(path) for path in Path(os.environ["HF_HOME"]).rglob("*.py")]

model = AutoModelForImageClassification.from_pretrained(classifier, trust_remote_code=True).eval()
results["module"] = type(model).__module__
results["weights"] = model.state_dict()
with torch.no_grad():
    early = model(images)
    results["exit_index"], results["early_logits"] = early.exit_index, early.logits
    results["exit_logits"] = model(images, output_hidden_states=True).exit_logits
processor = AutoImageProcessor.from_pretrained(classifier)
results["pixel_values"] = processor(Image.open(photo).convert("RGB"))["pixel_values"]
results["predictions"] = pipeline("image-classification", model=classifier, trust_remote_code=True)(photo, top_k=5)
model.config.early_exit = False  # with all exits, of which there are fewer than images
classify = pipeline("image-classification", model=model, image_processor=processor)
results["batch"] = classify([photo] * 6, batch_size=6, top_k=5)
model.save_pretrained(folder / "copy")
with torch.no_grad():
    features = AutoModel.from_pretrained(classifier, trust_remote_code=True)(images)
    results["features"] = features.pooler_output

maps = AutoModelForSemanticSegmentation.from_pretrained(segmenter, trust_remote_code=True).eval()
with torch.no_grad():
    results["maps"] = maps(images).logits
segment = pipeline("image-segmentation", model=segmenter, trust_remote_code=True)
predictions = segment(photo)
results["batch_of_masks"] = [len(segments) for segments in segment([photo] * 6, batch_size=6)]
results["masks"] = {
    prediction["label"]: torch.tensor(list(prediction["mask"].getdata())) for prediction in predictions
}
torch.save(results, folder / "results.pt")
