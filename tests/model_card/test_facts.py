"""Facts of a run: hyper-parameters, names of networks, and the commit."""

import subprocess

import timm

from hf_selfkd import MultiExitForImageClassification, get_method
from hf_selfkd.methods.none import NoDistillation
from hf_selfkd.model_card.environment import current_commit
from hf_selfkd.model_card.facts import changed_hyper_parameters, method_facts, name_of


def test_hyper_parameters_and_names_of_teachers(build, tmp_path):
    assert changed_hyper_parameters(get_method("byot")) == {}
    assert changed_hyper_parameters(get_method("byot", alpha=0.5)) == {"alpha": 0.5}
    kd = get_method("kd", teacher=timm.create_model("test_resnet.r160_in1k"))
    assert changed_hyper_parameters(kd) == {"teacher": "test_resnet.r160_in1k"}
    assert name_of(str(tmp_path)) == tmp_path.name and name_of("resnet50.a1_in1k") == "resnet50.a1_in1k"
    assert name_of(build()) == "MultiExitForImageClassification"
    build().save_pretrained(tmp_path / "teacher")
    loaded = MultiExitForImageClassification.from_pretrained(tmp_path / "teacher")
    both = get_method("byot+lsh", lsh={"teacher": loaded})
    assert changed_hyper_parameters(both) == {"lsh.teacher": "teacher"}


def test_methods_with_and_without_a_docstring(monkeypatch):
    facts = method_facts(get_method("byot+lsh", byot={"alpha": 0.5}))
    assert [method["name"] for method in facts["methods"]] == ["byot", "lsh"]
    assert all(method["paper"] in method["summary"] for method in facts["methods"])
    assert facts["hyper_parameters"] == {"byot.alpha": 0.5}
    monkeypatch.setattr(NoDistillation, "__doc__", "NoDistillation()")  # as dataclass writes it
    assert method_facts(get_method("none"))["methods"][0]["summary"] == ""


def test_the_commit_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert current_commit() is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "a.txt").write_text("a")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "a"], ["tag", "v1"]):
        subprocess.run([*git, *arguments], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert current_commit() == head
    (tmp_path / "a.txt").write_text("b")
    assert current_commit() == f"{head}-dirty"
