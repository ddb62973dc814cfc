"""An engine's layers: the numbers of the ordinary layer, bit for bit, and A gathered again when it changes."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from alora_kernels.ops.torch_rows import Slots, layout_of
from alora_kernels.routing import Routing, route
from alora_kernels.serving import TaskStore
from alora_kernels.serving.layer import SlotLinear, StepRouting
from alora_kernels.tuner.layer import ALoRALinear
from tests.support.adapters import alora_folder

TASKS = tuple(f"task{i}" for i in range(6))
SIZES = {
    "vocab_size": 320, "hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 512,
}  # fmt: skip
STEPS = {
    "a token each": [0, 3, 5, 1],
    "two of a task": [4, 0, 4, 2],
    "one task": [2, 2, 2],
    "all slots": [0, 1, 2, 3, 4, 5],
    "some of the base": [-1, 3, -1, 0],
    "the base alone": [-1, -1],
    "a prompt beside answers": [1] * 40 + [3, 0, 5],
    "long prompts": [1] * 90 + [0] * 90,
}


def base(dtype=torch.float32, make=LlamaConfig):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    if make is GPT2Config:
        return AutoModelForCausalLM.from_config(GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=320)).eval()
    return AutoModelForCausalLM.from_config(make(**SIZES)).to(dtype).eval()


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def served(request, tmp_path):
    model = base(request.param)
    folder = alora_folder(tmp_path / "a", model, TASKS, base_name=None)
    with closing(TaskStore.open(model, [folder], resident=len(TASKS))) as store:
        yield model, store


def logits(model, routing, tokens):
    ids = torch.arange(tokens)[None] % 300
    with torch.inference_mode(), route(routing):
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("slots", STEPS.values(), ids=STEPS)
def test_a_step_has_the_numbers_of_the_ordinary_layer(served, slots, monkeypatch):
    model, _ = served
    ids = torch.tensor([slots])
    assert any(type(module) is SlotLinear for module in model.modules())
    usual = logits(model, Routing(ids), len(slots))
    calls = []
    monkeypatch.setattr(ALoRALinear, "forward", lambda self, x: calls.append(self))
    assert torch.equal(logits(model, StepRouting(ids), len(slots)), usual)
    assert not calls  # nothing went the usual way


def test_a_written_again_is_gathered_again(served):
    model, store = served
    ids = torch.tensor([[0, 3]])
    before = logits(model, StepRouting(ids), 2)
    layer = next(module for module in model.modules() if type(module) is SlotLinear)
    kept = layer._gathered[2]
    assert torch.equal(logits(model, StepRouting(ids), 2), before) and layer._gathered[2] is kept
    store.slots.write(3, store.slots.read(5))
    after = logits(model, StepRouting(ids), 2)
    assert not torch.equal(after, before) and torch.equal(after, logits(model, Routing(ids), 2))
    assert layer._gathered[2] is not kept


def test_other_calls_go_the_usual_way(served):
    model, _ = served
    layer = next(module for module in model.modules() if type(module) is SlotLinear)
    x = torch.randn(3, layer.in_features, dtype=layer.base_layer.weight.dtype)
    step = StepRouting(torch.tensor([[0, 3, 5]]))
    with torch.inference_mode(), route(step):
        usual = layer(x)
        assert torch.equal(layer(x.t().contiguous().t()), usual)  # not in one piece
        with pytest.raises(ValueError, match="fit neither the batch nor the tokens"):
            layer(x[:2])
        handle = layer.base_layer.register_forward_hook(lambda module, args, out: out * 0)
        assert not torch.equal(layer(x), usual)
        handle.remove()
    with route(StepRouting(step.task_ids)):
        grown = x.clone().requires_grad_()
        layer(grown).sum().backward()
    assert grown.grad is not None


def test_a_transposed_base_goes_the_usual_way(tmp_path):
    model = base(make=GPT2Config)
    folder = alora_folder(tmp_path / "a", model, TASKS, base_name=None)
    with closing(TaskStore.open(model, [folder], resident=len(TASKS))):
        ids = torch.tensor([[0, 3, 5]])
        assert torch.equal(logits(model, StepRouting(ids), 3), logits(model, Routing(ids), 3))


def test_narrow_and_wide_layers_have_each_the_layout_of_the_ordinary_layer():
    step = StepRouting(torch.tensor([[1] * 24 + [0] * 24]))
    for k in (256, 1024, 256):
        layout = step.rows(6, torch.zeros(48, k), torch.float32).layout
        groups = step.groups(torch.Size([1, 48]), 6, torch.device("cpu"))
        assert type(layout) is type(layout_of(groups, k)) is (Slots if k == 256 else list)
