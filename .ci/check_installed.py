"""Train and save a small model with an installed package, without what its extras bring. Run by check_package.py."""

import sys
from importlib import metadata, resources

for name in ("matplotlib", "onnx", "onnxruntime", "onnxscript", "scipy", "sklearn"):
    sys.modules[name] = None  # cannot be imported

import torch  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

import hf_selfkd  # noqa: E402

package = resources.files(hf_selfkd)
assert str(package).startswith(sys.prefix), f"{package} was imported, which is not in {sys.prefix}"
assert hf_selfkd.__version__ == metadata.version("hf_selfkd")
for path in ("py.typed", "model_card/template.md", "model_card/citations.bib"):
    assert package.joinpath(path).is_file(), f"the wheel lacks {path}"

model = hf_selfkd.MultiExitForImageClassification.from_backbone("test_resnet", num_labels=2, small_input_stem=True)
samples = [{"pixel_values": torch.randn(3, 32, 32), "labels": label} for label in (0, 1, 0, 1)]
trainer = hf_selfkd.SelfDistillationTrainer(
    model, TrainingArguments("run", max_steps=1, use_cpu=True), train_dataset=samples, eval_dataset=samples
)
trainer.train()
trainer.evaluate()
trainer.save_model()
print(f"hf_selfkd {hf_selfkd.__version__} works in {sys.prefix}")
