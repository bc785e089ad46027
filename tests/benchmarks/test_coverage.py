import importlib.util
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# Families in which something of the size of the batch is computed before a stage ends and read after it: a parallel
# path, or the batch size itself. Early exit then runs the complete batch to the end.
NOT_CUTS = {
    "coat",
    "efficientvim",
    "hiera",
    "hrnet",
    "mobilenetv5",
    "nasnet",
    "pnasnet",
    "qwen3_vit",
    "twins",
    "xception",
    "xception_aligned",
}


@pytest.fixture
def coverage(monkeypatch):
    """Load the benchmark under a name that the tool for line coverage does not have."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("coverage_benchmark", BENCHMARKS / "coverage.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_census_counts_and_resumes(coverage, tmp_path, monkeypatch):
    arguments = ["--output", str(tmp_path), "--names", "test_resnet", "qwen3_vit_88m_enc"]
    records = coverage.main(arguments)
    assert [record["name"] for record in records["real"]] == ["test_resnet"]
    assert all(records["real"][0][check] is True for check in ("logits", "maps", "trains", "round_trip", "shrinks"))
    assert [record["continues"] for record in records["cut"]] == [True]
    assert json.loads((tmp_path / "coverage.json").read_text()) == records
    text = (tmp_path / "coverage.md").read_text()
    assert "## Cut at the exits, for files that exit early: 1 of 1" in text
    assert "- attached: 1 (50.0%)" in text
    assert "**no** qwen3_vit_88m_enc: ValueError: timm model 'qwen3_vit_88m_enc' is an encoder" in text
    monkeypatch.setattr(coverage, "attach", None)
    monkeypatch.setattr(coverage, "examine", None)
    assert coverage.main(arguments) == records
    assert coverage.main([*arguments, "--meta-only"])["real"] == []


def test_a_failed_check_is_a_result(coverage, tmp_path, monkeypatch):
    monkeypatch.setattr(coverage, "keep_rows", lambda output, rows, batch_size: output.flip(0)[: len(rows)])
    monkeypatch.setattr(coverage, "MEASURES", {"real": coverage.examine})
    record = coverage.main(["--output", str(tmp_path), "--names", "test_resnet"])["real"][0]
    assert record["shrinks"].startswith("stage 1: tensor 0 differs by")
    assert record["maps"] is True
    assert "**no** shrinks, test_resnet: stage 1: tensor 0" in (tmp_path / "coverage.md").read_text()


def test_real_tensors_need_sizes(coverage, tmp_path, capsys):
    with pytest.raises(SystemExit):
        coverage.main(["--output", str(tmp_path), "--real-only"])
    assert "--real-only and --cut-only need the sizes that a run with --meta-only finds." in capsys.readouterr().err


@pytest.mark.exhaustive
def test_every_timm_backbone(coverage, tmp_path):
    checks = importlib.import_module("coverage_report").CHECKS.keys() - {"shrinks"}
    records = coverage.main(["--output", str(tmp_path)])
    refused = [record for record in records["meta"] if "reason" in record]
    assert len(refused) < 0.01 * len(records["meta"])
    assert all("is an encoder without a classifier" in record["reason"] for record in refused)
    attached = [record for record in records["meta"] if "reason" not in record]
    assert all(record["random_states_kept"] for record in attached)
    assert {record["module"] for record in attached if not record["hooks"]} == {"hiera"}
    for record in records["real"]:
        for check in checks if "skipped" not in record else ():
            assert record[check] is True or record[check].startswith("not applicable"), record
    assert {r["module"] for r in records["real"] if r.get("shrinks", True) is not True} <= NOT_CUTS
