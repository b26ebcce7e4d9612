import json
import subprocess

import pytest
import torch

from secateur.measure import Layout, layouts, machine, probe_machine
from secateur.measure.machine import Row, cpu_name

CPU = torch.device("cpu")
SPARSE = [Layout.CSR_90, Layout.CSR_99, Layout.TWO_OF_FOUR]


@pytest.fixture(scope="module")
def facts():
    return probe_machine(0.05)


@pytest.mark.parametrize("layout", [*SPARSE, Layout.DENSE, Layout.ROWS])
@pytest.mark.parametrize("batch", [1, 16])
def test_every_layout_computes_the_product_it_stands_for(layout, batch):
    found = layouts.product(layout, layouts.stored(layout, CPU), batch, CPU)()
    expected = layouts.inputs(batch).double() @ layouts.masked(layout).double().t()
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_onnxruntime_computes_the_same():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    found = torch.from_numpy(layouts.product(Layout.ONNXRUNTIME, None, 16, CPU)())
    torch.testing.assert_close(found, layouts.inputs(16) @ layouts.weight().t(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "density"), [(Layout.CSR_90, 0.1), (Layout.CSR_99, 0.01), (Layout.TWO_OF_FOUR, 0.5)]
)
def test_densities(layout, density):
    weight = layouts.masked(layout)
    assert weight.count_nonzero() == int(weight.numel() * density)
    assert layouts.stored(layout, CPU).layout is torch.sparse_csr
    if layout is Layout.TWO_OF_FOUR:
        assert (weight.view(4096, 256, 4).count_nonzero(dim=-1) == 2).all()


def test_every_layout_is_measured_or_its_absence_explained(facts):
    wanted = set(Layout) - {Layout.ONNXRUNTIME}
    for batch in (1, 16):
        measured = {row.layout for row in facts.rows if row.batch == batch} - {Layout.ONNXRUNTIME}
        assert measured | {Layout(name) for name in facts.skipped} == wanted
        assert facts.speedup(Layout.DENSE, batch) == 1.0
    assert facts.threads == torch.get_num_threads()
    assert facts.speedup(Layout.CSR_90, 7) is None


def test_speedups_follow_from_the_medians(facts):
    dense = {row.batch: row.median for row in facts.rows if row.layout is Layout.DENSE}
    for row in facts.rows:
        assert row.speedup == pytest.approx(dense[row.batch] / row.median)
        assert row.p10 <= row.median <= row.p90


def test_one_sentence_a_row_and_plain_json(facts):
    assert len(facts.sentences) >= len(facts.rows) + len(facts.skipped)
    data = json.loads(json.dumps(facts.to_json(), allow_nan=False))
    assert data["layer"] == [4096, 1024]
    assert data["rows"][0]["layout"] == "dense float32"


@pytest.mark.parametrize(
    ("speedup", "verdict"),
    [(0.6, "slower than"), (0.95, "no gain"), (1.05, "no gain"), (3.0, "faster than")],
)
def test_verdicts(speedup, verdict):
    row = Row(Layout.CSR_90, 1, 2.0, 2.0, 2.0, speedup)
    assert machine._sentence(row) == f"90 % zeros, CSR: {speedup:.2g}x at batch 1: {verdict} " + (
        "over dense float32" if verdict == "no gain" else "dense float32"
    )


def test_the_pattern_is_compared_with_its_own_dtype_on_cuda():
    rows = [Row(Layout.BFLOAT16, 16, 3.0, 3.0, 3.0, 2.0), Row(Layout.TWO_OF_FOUR, 16, 2.0, 2.0, 2.0, 3.0)]
    (on_cuda,) = machine._about_pattern(rows, torch.device("cuda"))
    assert "1.5x at batch 16 over dense bfloat16" in on_cuda
    (on_cpu,) = machine._about_pattern(rows, CPU)
    assert "stored as CSR" in on_cpu


def test_unsteady_timings_are_said():
    steady, shaky = Row(Layout.DENSE, 1, 2.0, 2.0, 2.1, 1.0), Row(Layout.ROWS, 1, 2.0, 1.0, 5.0, 1.0)
    assert not list(machine._caveats([steady], {}))
    assert "vary by up to 5x" in next(machine._caveats([steady, shaky], {}))


def test_a_layout_that_fails_is_skipped_with_its_reason(monkeypatch):
    def stored(layout, device):
        if layout is Layout.CSR_99:
            raise RuntimeError("no sparse kernels\nlong trace")
        return layouts.masked(layout)

    monkeypatch.setattr(machine, "stored", stored)
    found = probe_machine(0.01)
    assert found.skipped == {"99 % zeros, CSR": "no sparse kernels"}
    assert found.speedup(Layout.CSR_99, 1) is None
    assert "99 % zeros, CSR: not measured here: no sparse kernels" in found.sentences


@pytest.mark.parametrize(("code", "expected"), [(0, None), (-4, "illegal instruction"), (1, "code 1")])
def test_the_trial_of_bfloat16_reads_the_exit_code(monkeypatch, code, expected):
    done = subprocess.CompletedProcess([], code)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: done)
    found = layouts.bfloat16_trouble.__wrapped__()
    assert found is None if expected is None else expected in found


def test_cpu_name(tmp_path):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast One @ 3 GHz\n")
    assert cpu_name(tmp_path / "cpuinfo") == "Fast One @ 3 GHz"
    assert cpu_name(tmp_path / "missing")
