"""Evidence without a GPU: reading binaries, occupancy, predictions, the command. Compilation is in tests/compile."""

from __future__ import annotations

import csv
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

pytest.importorskip("triton", reason="bench static compiles Triton kernels; only Linux has triton")

from bench import plot
from bench.static import command, mixtures, roofline
from bench.static.aot import Row, kernel_names
from bench.static.cubin import CHIPS, Counts, code_of, count, count_amdgcn, occupancy, read_amdgcn
from bench.static.roofline import (
    BACKWARD,
    FORWARD,
    LAYERS,
    Layer,
    Prediction,
    Rates,
    Step,
    predict,
    predict_all,
    size_of,
)
from tests.support import cli

app = typer.Typer()
app.command()(command.main)
SMALL = Layer("soft", 256, 128, 192, r=8, e=4)


# (chip, registers, shared, warps, tensor columns) -> programs and what limits them, by hand
OCCUPANCY = [
    ("sm_90", (255, 0, 8, 0), (1, "registers")),  # 2 warps of 256 registers in each partition of 512
    ("sm_90", (128, 0, 8, 0), (2, "registers")),
    ("sm_90", (129, 0, 4, 0), (3, "registers")),  # 129 become 136, of which 3 warps fit in a partition
    ("sm_90", (32, 100 * 1024, 4, 0), (2, "shared memory")),
    ("sm_90", (32, 113 * 1024, 4, 0), (2, "shared memory")),  # 2 x (113 + 1 reserved) KiB are all there is
    ("sm_90", (32, 114 * 1024, 4, 0), (1, "shared memory")),
    ("sm_90", (32, 232_449, 4, 0), (0, "shared memory")),  # more than one program may have
    ("sm_80", (32, 166_912, 4, 0), (1, "shared memory")),
    ("sm_80", (32, 166_913, 4, 0), (0, "shared memory")),
    ("sm_90", (24, 0, 4, 0), (16, "warps")),
    ("sm_90", (16, 0, 1, 0), (32, "programs")),
    ("sm_100", (64, 1024, 4, 128), (4, "tensor memory")),
    ("gfx942", (94, 0, 4, 0), (5, "registers")),  # what LLVM prints for 94 registers: "Occupancy: 5"
    ("gfx942", (16, 32 * 1024, 4, 0), (2, "shared memory")),
]


@pytest.mark.parametrize(("chip", "taken", "expected"), OCCUPANCY)
def test_occupancy(chip: str, taken: tuple[int, int, int, int], expected: tuple[int, str]) -> None:
    registers, shared, warps, columns = taken
    got = occupancy(CHIPS[chip], registers=registers, shared=shared, warps=warps, tensor_columns=columns)
    assert (got.programs, got.limit) == expected


def test_mnemonics_are_sorted_into_kinds() -> None:
    names = "HGMMA HGMMA HMMA UTCHMMA UTCATOMSWS UTMALDG UTMASTG LDGSTS ATOMG RED REDUX ATOMS LDSM WARPGROUP IMAD"
    expected = Counts({"HGMMA": 2, "HMMA": 1, "UTCHMMA": 1}, bulk=2, copies=1, atomics=2)
    assert count(names.split()) == expected


AMDGCN = """
_kernel:
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[2:3], v[4:5], a[0:15]
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[6:7], v[8:9], a[0:15]
\tbuffer_load_dwordx4 v1, s[0:3], 0 offen lds
\tbuffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen
\tglobal_atomic_add_f32 v[0:1], v2, off
    .private_segment_fixed_size: 156
    .sgpr_spill_count: 13
    .vgpr_count:     255
    .vgpr_spill_count: 38
"""


def test_amdgcn_is_read() -> None:
    assert count_amdgcn(AMDGCN) == Counts({"v_mfma_f32_32x32x8_bf16": 2}, bulk=0, copies=1, atomics=1)
    usage = read_amdgcn(AMDGCN)
    assert (usage.registers, usage.spilled) == (255, 156)  # scalar spills stay in registers


def test_something_else_is_no_cubin() -> None:
    with pytest.raises(ValueError, match="not a cubin"):
        code_of(b"; amdgcn text")


@pytest.mark.parametrize("direction", [FORWARD, BACKWARD])
@pytest.mark.parametrize("layer", [*LAYERS, SMALL], ids=lambda layer: f"{layer.routing} {layer.shape}")
def test_every_plan_multiplies_what_the_formula_needs(layer: Layer, direction: str) -> None:
    """Of our kernels and torch's operators together: nothing forgotten, nothing twice."""
    found = predict(layer, direction, Rates())
    # a plan is missing only where no kernel takes the layer
    assert {"two_launch", "base_first", "low_rank_first"} <= {name for p in found for name in p.plan.split(", ")}
    assert [p.plan for p in found if sum(step.flops for step in p.steps) != p.flops] == []
    assert sum(p.default for p in found) == 1
    for p in found:
        ids = 4 * (2 * layer.m + layer.e + 1)  # a launch that needs no order or offsets does not read them
        assert p.moved >= p.fewest - ids
        assert p.ratio > 1


def test_launches_of_the_plans() -> None:
    found = {p.plan: p for p in predict(LAYERS[0], FORWARD, Rates())}
    names = {plan: [(step.name, step.ours) for step in p.steps] for plan, p in found.items()}
    assert names["one_pass"] == [("one_pass_task", True)]
    assert names["two_launch"] == [("shrink_task", True), ("expand", True)]
    assert names["two_launch+pdl"] == names["two_launch"]
    assert names["base_first"] == [("shrink_task", True), ("torch.mm", False), ("torch.addmm_", False)]
    assert found["base_first"].moved > found["two_launch"].moved > found["one_pass"].moved
    # y = x w^T is written and read again: at least twice the output's bytes more
    y = 2 * LAYERS[0].m * LAYERS[0].n
    assert found["base_first"].moved - found["two_launch"].moved >= y


def test_time_is_the_larger_of_products_and_memory_plus_the_launch() -> None:
    rates = Rates(tflops=100, tbps=2, launch_us=5, ours=0.5)
    assert Step("a", (1,), 10**9, 10**6, ours=True).microseconds(rates) == pytest.approx(20 + 5)
    assert Step("a", (1,), 10**9, 10**6, ours=False).microseconds(rates) == pytest.approx(10 + 5)
    assert Step("a", (1,), 10**9, 10**8, ours=False).microseconds(rates) == pytest.approx(50 + 5)


def test_launches_that_overlap_are_one_with_the_products_and_bytes_of_both() -> None:
    rates = Rates(tflops=100, tbps=2, launch_us=5)
    for layer in (LAYERS[0], Layer("soft", 16, 4096, 4096)):  # bound by products, and by memory
        found = {p.plan: p for p in predict(layer, FORWARD, rates)}
        shrink, gemm = found["two_launch+pdl"].steps
        assert gemm.overlaps and not shrink.overlaps
        together = max((shrink.flops + gemm.flops) / 100e6, (shrink.moved + gemm.moved) / 2e6) + 5
        assert found["two_launch+pdl"].microseconds == pytest.approx(together)
        assert found["two_launch"].microseconds == pytest.approx(sum(s.microseconds(rates) for s in (shrink, gemm)))
        assert together < found["two_launch"].microseconds - 5


def test_frozen_layer_by_hand() -> None:
    found = predict(Layer("task", 8192, 4096, 4096), FORWARD, Rates(tflops=790, tbps=4.3, launch_us=3))
    assert found[0].frozen == pytest.approx(2 * 8192 * 4096 * 4096 / 790e6 + 3)
    # x, w, b, a, ids, order, offsets; y and the saved h
    inputs = 2 * (8192 * 4096 + 4096 * 4096 + 4096 * 16 + 8 * 16 * 4096) + 4 * (2 * 8192 + 9)
    assert found[0].fewest == inputs + 2 * (8192 * 4096 + 8192 * 16)


def test_sizes_count_nothing_twice() -> None:
    t = torch.empty(64, 32, device="meta")
    assert size_of([t]) == size_of([t, t]) == size_of([t, t.t(), t[:8]]) == 64 * 32 * 4
    assert size_of([t[:8]]) == 8 * 32 * 4
    assert size_of([torch.empty(32, device="meta").expand(64, 32)]) == 32 * 4


invoke = partial(cli.invoke, app, columns=200)


def test_predictions_are_called_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.report.tables.WIDTH", 200)
    out = invoke("--roofline-only", "--tflops", "500")
    assert "PREDICTED, not measured" in out and "500 TFLOP/s" in out
    assert "base_first *" in out and "compiled" not in out
    assert "expand_backward" not in out and "expand_backward" in invoke("--roofline-only", "--all")


def test_json_has_every_launch(tmp_path: Path) -> None:
    file = tmp_path / "static.json"
    assert invoke("--roofline-only", "--json", str(file)) == ""
    data = json.loads(file.read_text())
    assert data["compiled"] == []
    assert len(data["roofline"]) == len(list(predict_all(Rates())))
    first = data["roofline"][0]
    total = sum(step["predicted_us"] for step in first["launches"])
    assert first["ratio"] == pytest.approx(total / first["frozen_us"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chip", "sm_91"], "unknown chip 'sm_91': choose among sm_80, sm_86, sm_89"),
        (["--kernel", "expnd"], "unknown kernel 'expnd': choose among"),
    ],
)
def test_unknown_names_list_the_others(arguments: list[str], message: str) -> None:
    assert message in " ".join(invoke(*arguments, code=2).replace("│", " ").split())


def test_the_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "TRITON_INTERPRET is set" in invoke("--chip", "sm_90", code=2)


@pytest.mark.parametrize("m", mixtures.MIXTURES, ids=lambda m: m.name)
def test_adapted_experts_multiply_what_the_formula_needs(m: mixtures.Mixture) -> None:
    tokens = 128
    s, r = tokens * m.top, mixtures.RANK
    for per_token, (n, k) in zip((True, False), m.weights, strict=True):
        rows = tokens if per_token else s
        found = mixtures.stacked(m, tokens, n, k, per_token=per_token)
        for times, (ours, frozen) in zip((1, 2), found.values(), strict=True):
            base, low = 2 * s * n * k, 2 * r * (rows * k + s * n)
            assert sum(step.flops for step in frozen) == base
            assert sum(step.flops for step in ours) == base + times * low


def test_predictions_of_mixtures_are_called_so() -> None:
    first, _, _, _, *lines = mixtures.block(Rates(tbps=3)).splitlines()
    assert first.startswith("PREDICTED, not measured") and "3 TB/s" in first
    assert len(lines) == 9 and all(1.0 < float(line.strip("| ").split("|")[-1]) < 3.0 for line in lines)


def row(**values: Any) -> Row:
    return Row(**({"chip": "sm_90", "kernel": "expand", "variant": "bf16", "dtypes": "bf16", "blocks": {}} | values))


@pytest.mark.parametrize("before", ["none", "tf32"])
def test_listing_kernels_leaves_torchs_precision_as_it_was(before: str) -> None:
    matmul = torch.backends.cuda.matmul
    found, matmul.fp32_precision = matmul.fp32_precision, before
    try:
        assert "shrink_task" in kernel_names()
        assert matmul.fp32_precision == before
    finally:
        matmul.fp32_precision = found


def test_csv_has_the_worst_of_each_kernel(tmp_path: Path) -> None:
    rows = [
        row(registers=100, shared=8, shared_limit=99, programs=3, limit="registers", tensor={"HGMMA": 2}),
        row(registers=255, shared=5, shared_limit=99, programs=1, limit="shared memory", tensor={"HGMMA": 3}),
        row(kernel="da", spilled=8, programs=2, limit="warps", tensor={"v_mfma_f32_a": 1, "v_mfma_f32_b": 2}),
    ]
    file = tmp_path / "new" / "compiled.csv"
    command.write_csv(file, rows)
    first, second = csv.DictReader(file.open())
    assert (first["variants"], first["registers"], first["shared"], first["programs"]) == ("2", "255", "8", "1")
    assert (first["limited_by"], first["tensor"], second["tensor"]) == ("shared memory", "HGMMA 5", "v_mfma 3")
    assert first["triton"] and first["commit"] and first["date"]
    assert [r.bad for r in rows] == [False, False, True] and row(error="no").bad


def test_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    file = tmp_path / "roofline.png"
    invoke("--roofline-only", "--figure", str(file))
    assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 20_000


def two_layers() -> list[Prediction]:
    return list(predict_all(Rates(), [Layer("task", 8192, 4096, 4096), Layer("task", 64, 4096, 4096)]))


def test_the_first_line_says_predicted_and_every_plan_has_a_ratio() -> None:
    first, _, head, _, *lines = roofline.block(two_layers(), Rates(tflops=700), "figure.png").splitlines()
    assert first.startswith("PREDICTED, not measured") and "700 TFLOP/s" in first
    assert all(f"`{plan}`" in head for plan in roofline.COLORS)
    table = [line for line in lines if line.startswith("| task")]
    assert len(table) == 3  # forward and backward, and decoding
    for line in table:
        assert all(1.0 <= float(cell) < 2.0 for cell in line.strip("|").split("|")[3:])


def test_plot_writes_them_between_their_markers(tmp_path: Path) -> None:
    page, plain = tmp_path / "page.md", tmp_path / "plain.md"
    page.write_text("a\n<!-- bench-static:begin -->\nold\n<!-- bench-static:end -->\nb\n")
    plain.write_text("no markers")
    new = plot.rewritten([page, plain], {}, tmp_path)
    assert "PREDICTED, not measured" in new[page] and "old" not in new[page]
    assert new[page].startswith("a\n") and new[page].endswith("b\n")
    assert new[plain] == "no markers"
