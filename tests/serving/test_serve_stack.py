"""The stack: what lies in a slot answers as the saved adapter does, and nothing else moves."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import nn

from alora_kernels import route
from alora_kernels.adapters.config import AdapterFolderError
from alora_kernels.adapters.reader import AdapterFile, read_adapter
from alora_kernels.serving import slots as module
from alora_kernels.serving.slots import Slots
from alora_kernels.tuner import ALoRALayer
from tests.support.adapters import MLP, Mlp, alora_folder, change_config, change_weights, lora_folder, tiny_base


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_base()[0]


def gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
    torch.manual_seed(1)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, pad_token_id=0, eos_token_id=None)).eval()


def mlp_stack(folder: Path, capacity: int = 3, **options: Any) -> Slots:
    return Slots(Mlp(), read_adapter(folder), capacity, **options)


def fit(stack: Slots, file: AdapterFile) -> None:
    """All that a store asks of a folder."""
    stack.fit(file)
    stack.agree(file)


@pytest.fixture
def folder(tmp_path) -> Path:
    return alora_folder(tmp_path / "a", Mlp(), ["math"], **MLP)


@pytest.fixture
def stack(folder) -> Slots:
    return mlp_stack(folder)


def rows_of(stack: Slots) -> dict[str, torch.Tensor]:
    return {m: a.clone() for m, a in stack._a.items()}


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return model(input_ids=ids, **kwargs).logits


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"rank_pattern": {"q_proj": 2, "down_proj": 8}, "alpha_pattern": {"up_proj": 3.0}}]
)
def test_a_slot_answers_as_the_saved_adapter(llama, tmp_path, base_dtype, settings):
    base = deepcopy(llama).to(base_dtype)
    file = read_adapter(alora_folder(tmp_path / "a", llama, ["math", "code", "law"], **settings))
    stack = Slots(deepcopy(base), file, 5)
    slots = {"math": 4, "code": 0, "law": 2}
    for task, slot in slots.items():
        stack.write(slot, file.matrices(task))
    peft = PeftModel.from_pretrained(deepcopy(base), tmp_path / "a").eval()
    ids = torch.randint(1, 250, (3, 7), generator=torch.Generator().manual_seed(3))
    for task, slot in slots.items():
        with route(torch.tensor([slot] * 3)):
            ours = logits(stack.model, ids)
        assert torch.equal(ours, logits(peft, ids, adapter_names=[task] * 3)), task
        assert not torch.equal(ours, logits(base, ids)), task
    with route(torch.tensor([4, -1, 2])):
        mixed = logits(stack.model, ids)
    assert torch.equal(mixed, logits(peft, ids, adapter_names=["math", "__base__", "law"]))


@pytest.mark.parametrize("make", [alora_folder, lora_folder])
def test_conv1d_and_stock_lora(tmp_path, make):
    base = gpt2()
    folder = make(tmp_path / "a", base, *([["a"]] if make is alora_folder else []), target_modules=["c_attn", "c_fc"])
    file = read_adapter(folder)
    stack = Slots(deepcopy(base), file, 2)
    stack.write(1, file.matrices("a"))
    ids = torch.randint(1, 64, (2, 5))
    with route(torch.tensor([1, 1])):
        ours = logits(stack.model, ids)
    theirs = logits(PeftModel.from_pretrained(deepcopy(base), folder).eval(), ids)
    size = float(theirs.abs().max())
    assert float((ours - theirs).abs().max()) <= 2e-6 * size
    assert float((ours - logits(base, ids)).abs().max()) > 1e-3 * size


def test_a_call_that_says_no_task_is_refused_even_with_one_slot(folder):
    stack = mlp_stack(folder, 1)
    with pytest.raises(ValueError, match="this call says none"):
        stack.model(torch.ones(2, 8))
    with route(torch.tensor([0, -1])):
        stack.model(torch.ones(2, 8))
    with pytest.raises(ValueError, match="out of range"), route(torch.tensor([0, 1])):
        stack.model(torch.ones(2, 8))


def test_write_touches_only_its_slot_and_moves_nothing(tmp_path):
    folder = alora_folder(tmp_path / "a", Mlp(), ["math", "code", "law"], **MLP)
    file, stack = read_adapter(folder), mlp_stack(folder)
    for slot, task in enumerate(file.tasks):
        stack.write(slot, file.matrices(task))
    before = rows_of(stack)
    places = {m: a.data_ptr() for m, a in stack._a.items()}
    stack.write(1, {m: torch.full_like(a, 7.0) for m, a in file.matrices("code").items()})
    for m, a in rows_of(stack).items():
        assert torch.equal(a[[0, 2]], before[m][[0, 2]])
        assert bool((a[1] == 7).all())
    assert places == {m: a.data_ptr() for m, a in stack._a.items()}


def test_read_gives_back_the_bits_and_copies_them(tmp_path):
    folder = alora_folder(tmp_path / "a", Mlp(), ["math", "code"], **MLP)
    file, stack = read_adapter(folder), mlp_stack(folder)
    stack.write(2, file.matrices("code"))
    read = stack.read(2)
    assert all(torch.equal(read[m], a) for m, a in file.matrices("code").items())
    stack.write(2, file.matrices("math"))
    assert all(torch.equal(read[m], a) for m, a in file.matrices("code").items())


def test_smaller_ranks_are_padded_over_what_was_there(tmp_path):
    folder = alora_folder(tmp_path / "a", Mlp(), ["math"], r=4, lora_alpha=4, **MLP)
    stack = mlp_stack(folder)
    small = alora_folder(tmp_path / "small", Mlp(), ["tiny"], r=2, lora_alpha=2, seed=9, **MLP)
    b = read_adapter(folder).b
    change_weights(
        small, lambda t: t.update({f"base_model.model.{m}.asymlora_B.weight": b[m][:, :2].clone() for m in b})
    )
    file = read_adapter(small)
    fit(stack, file)  # the same s B in the columns that there are
    stack.write(0, {m: torch.full((4, at.k), 9.0) for m, at in stack.shapes.items()})
    stack.write(0, file.matrices("tiny"))
    x = torch.randn(3, 8)
    with route(torch.tensor([0] * 3)), torch.no_grad():
        ours = stack.model(x)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(Mlp(), small).eval()(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    held, padded = stack.read(0)["up"], stack.rows(file, "tiny")["up"]
    assert torch.equal(held, padded) and torch.equal(held[:2], file.matrices("tiny")["up"]) and not held[2:].any()


def test_bytes_and_shapes(tmp_path):
    folder = alora_folder(tmp_path / "a", Mlp(), ["math"], rank_pattern={"down": 2}, **MLP)
    stack = mlp_stack(folder, 3, dtype=torch.bfloat16)
    assert tuple(stack.shapes) == ("down", "up")
    assert stack.bytes_per_task == 2 * (4 * 8 + 2 * 16)
    assert stack.bytes_shared == 2 * (16 * 4 + 4 * 2)
    parameters = {n: p for n, p in stack.model.named_parameters() if "asymlora" in n}
    assert sum(p.nbytes for p in parameters.values()) == 3 * stack.bytes_per_task + stack.bytes_shared
    assert {p.dtype for p in parameters.values()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in stack.model.parameters())
    assert not any(m.training for m in stack.model.modules())


def test_only_exactly_the_named_modules_are_adapted(tmp_path):
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.mlp = nn.Linear(8, 16), Mlp()

    folder = alora_folder(tmp_path / "a", Mlp(), ["math"], **(MLP | {"target_modules": ["up"]}))
    stack = Slots(Nested(), read_adapter(folder), 2)
    assert [n for n, m in stack.model.named_modules() if isinstance(m, ALoRALayer)] == ["up"]


def test_building_leaves_the_random_state_alone(folder):
    before = torch.get_rng_state()
    mlp_stack(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stack_made_in_inference_mode_can_be_written_outside(folder):
    with torch.inference_mode():
        stack, file = mlp_stack(folder), read_adapter(folder)
    stack.write(0, file.matrices("math"))
    assert torch.equal(stack.read(0)["up"], file.matrices("math")["up"])


def assert_as_before(model: nn.Module, fresh: nn.Module) -> None:
    assert [(n, type(m), m.training) for n, m in model.named_modules()] == [
        (n, type(m), m.training) for n, m in fresh.named_modules()
    ]
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == [
        (n, p.requires_grad) for n, p in fresh.named_parameters()
    ]
    assert not model._forward_pre_hooks and "peft_config" not in vars(model)


def test_remove_gives_the_model_back(stack):
    stack.remove()
    assert_as_before(stack.model, Mlp())
    stack.model(torch.ones(1, 8)).sum().backward()


BAD_BASES = [
    (lambda: nn.Sequential(nn.Linear(8, 16)), "the base has no down, up"),
    (lambda: _with_up(nn.Linear(8, 12)), "up maps 8 features to 16 but the base maps 8 to 12"),
    (lambda: _with_up(nn.Linear(6, 16)), "up maps 8 features to 16 but the base maps 6 to 16"),
    (lambda: _with_up(nn.Embedding(8, 16)), "up is an Embedding"),
]


def _with_up(up: nn.Module) -> nn.Module:
    model = Mlp()
    model.up = up  # type: ignore[assignment]
    return model


@pytest.mark.parametrize(("make", "why"), BAD_BASES)
def test_a_base_that_does_not_fit_is_refused_untouched(folder, make, why):
    base = make()
    with pytest.raises(AdapterFolderError, match=why):
        Slots(base, read_adapter(folder), 2)
    assert_as_before(base, make())


def test_numbers_that_the_dtype_cannot_hold(folder):
    stack = mlp_stack(folder, dtype=torch.float16)
    change_weights(folder, lambda t: t["base_model.model.up.asymlora_A.weight"].fill_(1e6))
    with pytest.raises(AdapterFolderError, match=r"up holds a number too large for torch\.float16"):
        stack.rows(read_adapter(folder), "math")
    up_b(lambda b: b.fill_(1e6))(folder)
    base = Mlp()
    with pytest.raises(AdapterFolderError, match=r"too large for torch\.float16"):
        Slots(base, read_adapter(folder), 2, torch.float16)
    assert_as_before(base, Mlp())


def test_a_build_that_fails_halfway_gives_the_model_back(folder, monkeypatch):
    def out_of_memory(*args: Any) -> None:
        raise MemoryError

    base = Mlp()
    monkeypatch.setattr(module, "AdapterSpec", out_of_memory)
    with pytest.raises(MemoryError):
        Slots(base, read_adapter(folder), 2)
    assert_as_before(base, Mlp())


def test_a_model_with_adapters(folder, stack):
    with pytest.raises(ValueError, match="has adapters already"):
        Slots(stack.model, read_adapter(folder), 2)


def test_write_refuses_other_matrices_and_writes_none_of_them(stack):
    before = rows_of(stack)
    for wrong in ({"down": torch.ones(4, 16)}, {"down": torch.ones(4, 16), "up": torch.ones(4, 9)},
                  {"down": torch.ones(4, 16), "up": torch.ones(5, 8)}):  # fmt: skip
        with pytest.raises(ValueError, match=r"missing up|must be at most \[4, 8\]"):
            stack.write(0, wrong)
    assert all(torch.equal(a, before[m]) for m, a in rows_of(stack).items())


def up_b(change: Callable[[torch.Tensor], Any]) -> Callable[[Path], None]:
    return lambda folder: change_weights(folder, lambda t: change(t["base_model.model.up.asymlora_B.weight"]))


def other_folder(tmp_path: Path, base: nn.Module | None = None, **settings: Any) -> Path:
    """One with the same B, but for the settings."""
    return alora_folder(tmp_path / "b", base or Mlp(), ["code"], **({"seed": 1, "seed_b": 0} | MLP | settings))


UNFIT = [
    (dict(base_name="other"), None, "trained on 'other' but this store serves 'tiny-random'"),
    (dict(target_modules=["up"]), None, "missing down"),
    (dict(base=_with_up(nn.Linear(6, 16))), None, "up maps 6 features to 16 but the base maps 8 to 16"),
    (dict(r=8), None, "rank 8 does not fit the stack's rank 4 at"),
    (dict(seed_b=5), None, "its B differs from the B that all tasks share.*alora import"),
    (dict(lora_alpha=9), None, r"largest relative difference 0\.11 at"),
    ({}, up_b(lambda b: b.mul_(1.5)), r"largest relative difference 0\.33 at up"),
    (dict(alpha_pattern={"up": 1e308}), up_b(lambda b: b.fill_(1e30)), "its B differs.* nan at up"),  # infinite s B
]


@pytest.mark.parametrize(("settings", "spoil", "why"), UNFIT)
def test_folders_that_do_not_fit(tmp_path, stack, settings, spoil, why):
    other = other_folder(tmp_path, **settings)
    if spoil:
        spoil(other)
    with pytest.raises(AdapterFolderError, match=why):
        fit(stack, read_adapter(other))


def test_at_most_five_modules_are_listed(llama, tmp_path):
    file = read_adapter(alora_folder(tmp_path / "a", llama, ["math"]))
    stack = Slots(deepcopy(llama), file, 1)
    other = read_adapter(alora_folder(tmp_path / "b", llama, ["math"], target_modules=["q_proj"]))
    with pytest.raises(AdapterFolderError, match=r"missing (\S+, ){4}\S+ and 7 more$"):
        fit(stack, other)


@pytest.mark.parametrize("base_name", [None, "tiny-random"])
def test_folders_that_fit(tmp_path, stack, base_name):
    fit(stack, read_adapter(other_folder(tmp_path, base_name=base_name)))


def test_a_scale_folded_into_b_fits(tmp_path, folder, stack):
    b = read_adapter(folder).b  # s = 2
    folded = lora_folder(tmp_path / "folded", Mlp(), lora_alpha=4, **MLP)  # s = 1
    change_weights(folded, lambda t: t.update({f"base_model.model.{m}.lora_B.weight": 2 * b[m] for m in b}))
    fit(stack, read_adapter(folded))
    change_config(folded, lora_alpha=8)
    with pytest.raises(AdapterFolderError, match="largest relative difference 0.5"):
        fit(stack, read_adapter(folded))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_b_in_16_bits_fits_to_rounding(tmp_path, folder, dtype):
    stack, other = mlp_stack(folder, dtype=dtype), other_folder(tmp_path)
    fit(stack, read_adapter(other))
    up_b(lambda b: b.mul_(1.03))(other)
    with pytest.raises(AdapterFolderError, match="its B differs"):
        fit(stack, read_adapter(other))


@pytest.mark.gpu
def test_on_a_gpu(tmp_path):
    folder = alora_folder(tmp_path / "a", Mlp(), ["math", "code"], **MLP)
    file, stack = read_adapter(folder), Slots(Mlp().cuda(), read_adapter(folder), 3)
    stack.write(1, file.matrices("code"))
    with torch.cuda.stream(torch.cuda.Stream()):
        held = stack._a["up"][1].cpu()
    assert torch.equal(held, file.matrices("code")["up"])
    assert all(t.device.type == "cpu" for t in stack.read(1).values())
