"""`bench serving`: loads, the judgement of tokens, every provider on a tiny model, rows, goals, the command."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
import typer
from typer.testing import CliRunner

pytest.importorskip("peft", reason="the baselines are PEFT's")

from alora_kernels import data
from bench.report.rows import OK, WRONG, newest
from bench.report.sheet import Sheet, read
from bench.report.targets import judge
from bench.serving import command
from bench.serving.adapters import Adapters, Truth, sharing
from bench.serving.load import Load, Outcome, Request, by_task, choose, numbers, prompts, requests_of
from bench.serving.providers import Stage, providers_of
from bench.serving.rows import BASE, MERGED, MIXED, NUMBERS, OURS, PROVIDERS, SERIAL, Repeat, goals, medians
from bench.serving.run import Job, Runner

LOAD = Load("uniform", tasks=4, concurrency=4, requests=10, new_tokens=6)


def need_data():
    try:
        data.load_task("movie", test_size=2)
        data.load_task("bbc", test_size=2)
    except data.MissingPackageError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def tiny():
    return data.load_model("tiny-random")


@pytest.fixture(scope="module")
def adapters(tiny):
    return Adapters(tiny[0], tasks=5, r=4)


@pytest.fixture(scope="module")
def truth(tiny, adapters):
    return Truth(sharing(tiny[0]), adapters)


@pytest.fixture(scope="module")
def texts():
    draw = torch.Generator().manual_seed(3)
    return [tuple(torch.randint(5, 200, (length,), generator=draw).tolist()) for length in (24, 31, 40, 27, 25)]


@pytest.fixture(scope="module")
def stage(tiny, adapters, tmp_path_factory):
    return Stage(*tiny, adapters, tmp_path_factory.mktemp("stage"))


def plainly(tiny, adapters, request, new_tokens):
    """The greedy answer of stock PEFT with this one LoRA, by `generate`."""
    task = request.task or 0
    model = adapters.stock(sharing(tiny[0]), [task])
    if request.task is None:
        model = copy.deepcopy(model).unload()
    out = model.generate(input_ids=torch.tensor([request.prompt]), max_new_tokens=new_tokens, do_sample=False)
    return tuple(out[0, len(request.prompt) :].tolist())


def outcome(request, tokens):
    return Outcome(request, tuple(tokens), 0.0, 0.1, 0.2)


def test_popularities():
    assert set(choose("identical", 8, 20)) == {0}
    spread = choose("uniform", 16, 48)
    assert all(sorted(spread[i : i + 16]) == list(range(16)) for i in (0, 16, 32))
    assert spread[:16] != spread[16:32]
    drawn = Counter(choose("zipf", 64, 4000))
    assert drawn[0] > 1.7 * drawn[1] > 1.7 * drawn[5]  # 2 ** 1.1 = 2.1
    assert len(drawn) > 50
    assert choose("zipf", 64, 4000) == choose("zipf", 64, 4000)


@pytest.mark.parametrize(("popularity", "tasks"), [("often", 2), ("uniform", 0)])
def test_a_popularity_that_is_none(popularity, tasks):
    with pytest.raises(ValueError, match="uniform, zipf, identical"):
        choose(popularity, tasks, 3)


def test_prompts_are_real_and_of_the_promised_length(tiny):
    need_data()
    found = prompts(tiny[1], 40)
    assert len(found) == 40
    assert len(set(found)) > 35
    assert all(24 <= len(ids) <= 64 for ids in found)
    assert requests_of(replace(LOAD, requests=50), found)[45].prompt == found[5]


@pytest.mark.parametrize(("popularity", "tasks"), [("uniform", 4), ("zipf", 9), ("identical", 3)])
def test_batches_of_a_server_that_holds_one_task(popularity, tasks):
    requests = [Request(task, (1,)) for task in choose(popularity, tasks, 50)]
    served: list[int] = []
    for batch in by_task(requests, 16):
        waiting = [i for i in range(50) if i not in served][: 16 if len(served) <= 34 else None]
        assert batch[0] == waiting[0]  # the oldest
        assert batch == [i for i in waiting if requests[i].task == requests[batch[0]].task]  # and all with its task
        served += batch
    assert sorted(served) == list(range(50))


def test_numbers():
    request = Request(0, (1,))
    outcomes = [Outcome(request, (1, 2, 3), 0.0, 0.1, 0.5), Outcome(request, (4,), 0.5, 0.6, 1.0)]
    times = {"first_p50_ms": 100.0, "first_p95_ms": 600.0, "latency_p50_ms": 500.0, "latency_p95_ms": 1000.0}
    wanted = times | {"tokens_per_second": 4.0, "batch_mean": 1.0}
    assert numbers(outcomes, wall=1.0) == pytest.approx(wanted)


def test_copies_share_weights_and_nothing_else(tiny):
    copied = sharing(tiny[0])
    assert all(a is b for a, b in zip(copied.parameters(), tiny[0].parameters(), strict=True))
    copied.config.eos_token_id = 7
    assert tiny[0].config.eos_token_id != 7
    assert copied.model.layers[0].self_attn is not tiny[0].model.layers[0].self_attn


def test_the_folder_holds_what_the_loras_hold(tiny, adapters, tmp_path):
    from peft import PeftModel

    ours = PeftModel.from_pretrained(sharing(tiny[0]), adapters.write(tmp_path / "three", 3)).eval()
    stock = adapters.stock(sharing(tiny[0]), [2, 1])
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        for task in (1, 2):
            stock.set_adapter(adapters.name(task))
            mine = ours(input_ids=ids, adapter_names=[adapters.name(task)]).logits
            torch.testing.assert_close(mine, stock(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    weights = sum(p.nbytes for n, p in stock.named_parameters() if "lora_" in n)
    assert weights == 2 * adapters.lora_bytes
    assert sum(p.nbytes for n, p in ours.named_parameters() if "asymlora_" in n) == (
        3 * adapters.a_bytes + adapters.b_bytes
    )


@pytest.mark.parametrize("task", [None, 0, 3])
def test_right_tokens_pass_and_another_tasks_do_not(tiny, adapters, truth, texts, task):
    request = Request(task, texts[0])
    right = plainly(tiny, adapters, request, 8)
    check = truth.check([outcome(request, right)], 8)
    assert (check.wrong, check.tokens, check.equal) == ("", 8, 8)
    for other in {None, 0, 3, 4} - {task}:
        assert "below the most likely" in truth.check([outcome(replace(request, task=other), right)], 8).wrong
    assert "7 tokens instead of 8" in truth.check([outcome(request, right[:7])], 8).wrong


def test_a_tie_is_counted_and_no_error(truth, texts, monkeypatch):
    logits = torch.tensor([[5.0, 5.0 - 1e-5, 0.0], [1.0, 2.0, 3.0]])
    monkeypatch.setattr(truth, "_logits", lambda request, tokens: logits)
    check = truth.check([outcome(Request(0, texts[0]), [1, 2])], 2)
    assert (check.wrong, check.tokens, check.equal) == ("", 2, 1)


@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("popularity", ["uniform", "zipf"])
def test_every_provider_gives_the_tokens_of_stock_peft(tiny, adapters, truth, stage, texts, name, popularity):
    load = replace(LOAD, popularity=popularity)
    provider, requests = providers_of(stage)[name], requests_of(load, texts)
    with provider.opened(load) as serve:
        outcomes = serve(requests, load.new_tokens)
        again = serve(requests[:4], 2)
    wanted = [replace(r, task=None) for r in requests] if name == BASE else requests
    assert [o.request for o in outcomes] == wanted
    assert all(0 <= o.taken_up <= o.first_token <= o.end for o in outcomes)
    assert truth.check(outcomes, load.new_tokens).wrong == ""
    assert [o.tokens for o in again] == [o.tokens[:2] for o in outcomes[:4]]
    assert outcomes[0].tokens == plainly(tiny, adapters, wanted[0], load.new_tokens)


def test_merging_leaves_the_weights_of_the_others_alone(tiny, stage, texts):
    before = {name: p.clone() for name, p in tiny[0].named_parameters()}
    with providers_of(stage)[MERGED].opened(LOAD) as serve:
        serve(requests_of(LOAD, texts), 2)
    assert all(torch.equal(p, before[name]) for name, p in tiny[0].named_parameters())


def test_adapter_bytes(stage, adapters):
    known = providers_of(stage)
    assert known[OURS].adapter_bytes(LOAD) == 4 * adapters.a_bytes + adapters.b_bytes
    assert known[SERIAL].adapter_bytes(LOAD) == known[MIXED].adapter_bytes(LOAD) == 4 * adapters.lora_bytes
    assert known[BASE].adapter_bytes(LOAD) == 0
    assert "65 LoRAs" in (known[MIXED].missing(replace(LOAD, tasks=65)) or "")


class FakeProvider:
    """Gives what a function says."""

    def __init__(self, name, answer, missing=None):
        self.extras = {"startup_s": 2.5}
        self.name, self._answer, self._missing, self.calls = name, answer, missing, 0

    def missing(self, load):
        return self._missing

    def adapter_bytes(self, load):
        return 1_500_000

    @contextmanager
    def opened(self, load):
        yield self._serve

    def _serve(self, requests, new_tokens):
        self.calls += 1
        return [outcome(r, self._answer(self.calls, r, new_tokens)) for r in requests]


def runner(tmp_path, truth, texts):
    return Runner(Sheet(tmp_path / "s.csv", Repeat), Repeat(date="now", device="cpu"), texts, truth)


def test_the_runner_times_what_is_right_only(tiny, adapters, truth, texts, tmp_path):
    known: dict[Request, tuple[int, ...]] = {}

    def right(call, request, new_tokens):
        if request not in known:
            known[request] = plainly(tiny, adapters, request, LOAD.new_tokens)
        return known[request][:new_tokens]

    def later_wrong(call, request, new_tokens):  # calls: verify, warm, timed
        return right(call, request if call < 3 else replace(request, task=3 - request.task), new_tokens)

    def fails(call, request, new_tokens):
        raise RuntimeError("no\nway")

    fakes = [
        FakeProvider("right", right),
        FakeProvider("wrong", lambda call, request, new_tokens: (1,) * new_tokens),
        FakeProvider("later wrong", later_wrong),
        FakeProvider("fails", fails),
        FakeProvider("missing", right, "too big"),
    ]
    run = runner(tmp_path, truth, texts)
    rows = run.measure([Job(fake, LOAD) for fake in fakes], repeats=2)
    by_name = {fake.name: [row for row in rows if row.provider == fake.name] for fake in fakes}
    assert [row.repeat for row in by_name["right"]] == [0, 1]
    assert all(row.tokens_per_second and row.equal == 1 and row.adapter_mb == 1.5 for row in by_name["right"])
    assert {row.startup_s for row in by_name["right"]} == {2.5}
    assert [row.status for row in by_name["wrong"]] == [WRONG]
    assert "below the most likely" in by_name["wrong"][0].note
    assert [row.status for row in by_name["later wrong"]] == [WRONG]
    assert by_name["later wrong"][0].tokens_per_second is None
    assert [row.status for row in by_name["fails"]] == ["failed: RuntimeError: no way"]
    assert [row.status for row in by_name["missing"]] == ["not available: too big"]
    assert fakes[1].calls == 1  # verified, never timed
    assert read(tmp_path / "s.csv", Repeat) == [
        replace(row, **{n: None if v is None else float(f"{v:.6g}") for n, v in numbers_of(row).items()})
        for row in rows
    ]


def numbers_of(row):
    return {name: getattr(row, name) for name in NUMBERS}


def test_an_interrupted_run_keeps_its_rows(tiny, adapters, truth, texts, tmp_path):
    def interrupts(call, request, new_tokens):
        raise KeyboardInterrupt

    run = runner(tmp_path, truth, texts)
    with pytest.raises(KeyboardInterrupt):
        run.measure([Job(FakeProvider("gone", str, "why"), LOAD), Job(FakeProvider("x", interrupts), LOAD)], repeats=1)
    assert [row.provider for row in run.rows] == [row.provider for row in read(tmp_path / "s.csv", Repeat)]
    assert [row.provider for row in run.rows] == ["gone"]


def row(provider, tasks, speed, popularity="uniform", **columns):
    numbers = {"first_p50_ms": 10.0, "first_p95_ms": 30.0, "latency_p50_ms": 50.0, "latency_p95_ms": 60.0}
    numbers |= {"batch_mean": 8.0, "adapter_mb": 1.0}
    same = {"date": "2026-01-02", "device": "a CPU, 2 threads", "model": "tiny", "r": 8, "dtype": "float32"}
    return Repeat(
        provider=provider, tasks=tasks, tokens_per_second=speed, popularity=popularity, **numbers | same | columns
    )


def test_medians_hide_no_wrong_repeat():
    rows = [row(OURS, 4, speed, repeat=i) for i, speed in enumerate((1.0, 9.0, 2.0))]
    assert [found.tokens_per_second for found in medians(rows)] == [2.0]
    assert [found.status for found in medians(rows)] == [OK]
    assert [found.status for found in medians([*rows, row(OURS, 4, None, status=WRONG)])] == [WRONG]
    assert newest([*rows, row(OURS, 4, 5.0, date="2025-01-01")], lambda row: "") == rows


def test_goals():
    speeds = {(OURS, 16): 30.0, (SERIAL, 16): 10.0, (MIXED, 16): 24.0, (BASE, 16): 40.0, (OURS, 1): 40.0}
    found = medians([*(row(n, t, s) for (n, t), s in speeds.items()), row(OURS, 256, None, status=WRONG)])
    verdicts = [judge(goal, found) for goal in goals([1, 256], 16)]
    judged = {v.target.ratio_of: (v.measured or v.reason, v.target.must) for v in verdicts}
    assert judged == {
        f"{OURS} / {SERIAL}, uniform over 16": (3.0, 3.0),
        f"{OURS} / {MERGED}, uniform over 16": (f"{MERGED}, 16 tasks: not run", 3.0),
        f"{OURS} / {MIXED}, uniform over 16": (1.25, 1.5),
        f"{OURS} / {BASE}, uniform over 16": (0.75, None),
        f"{OURS}, uniform: 256 tasks / 1": (f"{OURS}, 256 tasks: wrong", 0.9),
    }
    assert len(goals([16], 16)) == 4


def test_the_figure_shows_what_was_measured(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib draws the figure")
    from matplotlib.figure import Figure

    from bench.serving import figure

    rows = [row(OURS, tasks, 100.0 + tasks, p) for tasks in (8, 256) for p in ("uniform", "zipf")]
    rows += [
        row(name, tasks, speed) for name, tasks, speed in ((OURS, 1, 101.0), (OURS, 16, 116.0), (SERIAL, 16, 20.0))
    ]
    rows += [row(MIXED, 16, 60.0), row(BASE, 16, 150.0)]
    left, right = Figure().subplots(1, 2)
    figure._throughput(left, rows)
    lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in left.get_lines()}
    assert lines[f"{OURS}: uniform"] == [(1, 101.0), (8, 108.0), (16, 116.0), (256, 356.0)]
    assert lines[f"{OURS}: zipf"] == [(1, 101.0), (8, 108.0), (256, 356.0)]
    assert lines[SERIAL] == [(16, 20.0)]
    assert f"{OURS}: identical" not in lines
    figure._first_token(right, rows)
    assert [tick.get_text() for tick in right.get_yticklabels()] == [MIXED, SERIAL, BASE, OURS]
    figure.plot([*rows, row(MIXED, 256, None, status="not available: many")], tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"


def invoke(*arguments):
    app = typer.Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, list(arguments))


def test_the_command_from_end_to_end(tmp_path):
    need_data()
    pytest.importorskip("matplotlib", reason="matplotlib draws the figure")
    out = tmp_path / "tiny.csv"
    sizes = {"concurrency": 4, "requests": 6, "new-tokens": 3, "repeats": 1, "threads": 1, "r": 4}
    options = [x for name, size in sizes.items() for x in (f"--{name}", str(size))]
    done = invoke("--model", "tiny-random", *options, "--tasks", "2", "--tasks", "1", "--out", str(out))
    assert done.exit_code == 0, done.output
    rows = read(out, Repeat)
    assert all(row.status == OK and row.checked == 12 for row in rows), [(row.provider, row.status) for row in rows]
    assert Counter((row.provider, row.tasks) for row in rows) == {
        (OURS, 16): 1, (OURS, 1): 1, (OURS, 2): 3, (MIXED, 16): 1, (MIXED, 1): 1, (MIXED, 2): 1,
        (SERIAL, 16): 1, (MERGED, 16): 1, (BASE, 16): 1,
    }  # fmt: skip
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert "rows written to" in done.output
    assert f"{OURS} / {SERIAL}" in " ".join(done.output.split())


def test_what_is_measured():
    full = partial(command.Plan, "m", concurrency=16, requests=48, new_tokens=24, r=8, repeats=3, providers=PROVIDERS)
    loads = full(tasks=command.TASKS, popularities=("uniform", "zipf", "identical")).loads()
    ours = [(load.popularity, load.tasks) for name, load in loads if name == OURS]
    assert len(ours) == len(set(ours)) == 1 + 1 + 3 * 3  # 16, 1, and 8, 64, 256 three times
    assert [load.tasks for name, load in loads if name == SERIAL] == [16]
    assert sorted(load.tasks for name, load in loads if name == MIXED) == [1, 8, 16, 64, 256]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--provider", "nobody"), "PEFT mixed generate"),
        (("--popularity", "often"), "zipf"),
        (("--tasks", "0"), "at least 1"),
    ],
)
def test_bad_options_name_the_remedy(arguments, said):
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert said in " ".join(done.output.replace("│", " ").split())
