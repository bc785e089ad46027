import pytest
import timm
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from hf_selfkd import get_method
from hf_selfkd.methods import teacher_match

NAMES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture
def student(build):
    model = build(id2label=dict(enumerate(NAMES)))
    model.config.pretrained_cfg |= {"mean": [0.5, 0.5, 0.5], "std": [0.25] * 3, "input_size": (3, 32, 32)}
    return model


@pytest.fixture
def warned(monkeypatch):
    """Return a function that attaches a teacher and returns the warnings."""
    texts = []
    monkeypatch.setattr(teacher_match.logger, "warning", lambda text, *values: texts.append(text % values))

    def warned(teacher, student):
        texts.clear()
        get_method("kd", teacher=teacher).attach(student)
        return texts

    return warned


def multi_exit(build, names, **data):
    model = build(id2label=dict(enumerate(names)))
    model.config.pretrained_cfg |= {"mean": (0.5,) * 3, "std": (0.25,) * 3, "input_size": (3, 32, 32)} | data
    return model


def transformers_vit(build, names):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, id2label=dict(enumerate(names)), **size))


def timm_resnet(build, names):
    return timm.create_model(
        "test_resnet",
        num_classes=5,
        pretrained_cfg_overlay={
            "label_names": names,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.25,) * 3,
            "input_size": (3, 32, 32),
        },
    )


KINDS = [multi_exit, transformers_vit, timm_resnet]


@pytest.mark.parametrize("kind", KINDS)
def test_classes_in_another_order_are_refused(build, student, kind):
    words = "in another order: 'cat' is its class 3, but class 2 of the model"
    with pytest.raises(ValueError, match=words):
        get_method("kd", teacher=kind(build, ["ant", "bee", "dog", "cat", "eel"])).attach(student)


@pytest.mark.parametrize("kind", KINDS)
def test_other_names_are_warned_of(build, student, warned, kind):
    assert warned(kind(build, NAMES), student) == []
    (text,) = warned(kind(build, ["ant", "bee", "cat", "dog", "fox"]), student)
    assert text == "The teacher has other class names than the model, whose ['eel'] it does not have."


def test_a_name_that_occurs_twice_has_no_order(build, warned):
    names = ["crane", "bee", "crane", "dog", "eel"]
    student = multi_exit(build, names)
    assert warned(multi_exit(build, names), student) == []


def test_names_by_default_say_nothing(build, student, warned):
    assert warned(multi_exit(build, [f"LABEL_{index}" for index in range(5)]), student) == []


def test_other_images_are_warned_of(build, student, warned):
    teacher = multi_exit(build, NAMES, mean=(0.1, 0.5, 0.5), input_size=(3, 64, 64))
    texts = warned(teacher, student)
    assert sorted(text[: text.index(". It")] for text in texts) == [
        "The teacher is for images with mean (0.1, 0.5, 0.5), but the model for (0.5, 0.5, 0.5)",
        "The teacher is for images with size (64, 64), but the model for (32, 32)",
    ]


def test_what_a_network_was_built_for_counts_where_timm_does_not_note_it(student, warned):
    data = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    size = {"img_size": 32, "patch_size": 8}
    assert warned(timm.create_model("test_vit", num_classes=5, pretrained_cfg_overlay=data, **size), student) == []
    plain = ResNetForImageClassification(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], num_labels=5))
    assert warned(plain, student) == []
