"""How a batch says which task each row belongs to: adapter_names, route, set_task; forward and generate."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

import alora_kernels
from alora_kernels.routing import ConstantRouting, group_rows
from alora_kernels.tuner import set_task

from ..support.tiny import (
    IMAGE,
    Mlp,
    adapted,
    adapter_grads,
    bert,
    each_row_alone,
    gpt2,
    layers_of,
    llama,
    llava,
    logits,
    no_dropout,
    t5,
    tokens,
)

NAMES = ["math", "code", "__base__"]


@pytest.mark.parametrize("base", [llama, gpt2])
@pytest.mark.parametrize("training", [False, True])
def test_a_mixed_batch_equals_its_rows_alone(device, base, training):
    near = {"rtol": 1e-5, "atol": 1e-5} if device == "cpu" else {"rtol": 1e-4, "atol": 1e-4}
    ids = tokens(3).to(device)
    plain = logits(base().to(device), ids)
    model = no_dropout(adapted(base())).train(training).to(device)
    mixed = each_row_alone(model, {"input_ids": ids}, NAMES, **near)
    torch.testing.assert_close(mixed[2], plain[2], **near)
    assert not torch.allclose(mixed[0], plain[0], atol=1e-3)


def test_names_integers_tensor_and_context_agree():
    model, ids = adapted(), tokens(3)
    wanted = logits(model, ids, adapter_names=NAMES)
    assert torch.equal(wanted, logits(model, ids, adapter_names=torch.tensor([0, 1, -1])))
    assert torch.equal(wanted, logits(model, ids, adapter_names=[0, "code", -1]))
    per_token = torch.tensor([0, 1, -1])[:, None].expand(3, 6)
    assert torch.equal(wanted, logits(model, ids, adapter_names=per_token))
    with alora_kernels.route([0, 1, -1]):
        assert torch.equal(wanted, logits(model, ids))
        assert torch.equal(wanted, logits(model.base_model.model, ids))


def test_packed_rows_take_one_id_per_token():
    model = adapted(target_modules=["up_proj", "down_proj"])
    packed = tokens(1, 6)
    with alora_kernels.route(torch.tensor([[0, 0, 0, 1, 1, -1]])):
        mixed = model.base_model.model.model.layers[0].mlp(torch.ones(1, 6, 32))
    for position, task in ((0, 0), (4, 1), (5, -1)):
        with alora_kernels.route([task]):
            alone = model.base_model.model.model.layers[0].mlp(torch.ones(1, 6, 32))
        torch.testing.assert_close(mixed[:, position], alone[:, position])
    with alora_kernels.route(torch.tensor([[0, 0, 0, 1, 1, -1]])):
        assert model(input_ids=packed).logits.shape == (1, 6, 64)


def test_gradients_reach_only_the_tasks_of_the_batch():
    model = adapted(tasks=3).train()
    model(input_ids=tokens(), labels=tokens(), adapter_names=["0", "2"]).loss.backward()
    for layer in layers_of(model):
        grad = layer.asymlora_A["default"].weight.grad
        assert grad[0].abs().max() > 0
        assert grad[2].abs().max() > 0
        assert torch.equal(grad[1], torch.zeros_like(grad[1]))
    assert all("asymlora_" in name for name in adapter_grads(model))


@pytest.mark.parametrize(
    "how",
    [
        {}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
    ],
)  # fmt: skip
@pytest.mark.parametrize("base", [llama, t5])
def test_generate_equals_each_task_alone(base, how):
    kind = "CAUSAL_LM" if base is llama else "SEQ_2_SEQ_LM"
    model, ids = adapted(base(), task_type=kind), tokens(3)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "attention_mask": torch.ones_like(ids), **how}
    together = model.generate(input_ids=ids, adapter_names=NAMES, **how)
    n = how.get("num_return_sequences", 1)
    how["attention_mask"] = how["attention_mask"][:1]
    for row, name in enumerate(NAMES):
        alone = model.generate(input_ids=ids[row : row + 1], adapter_names=[name], **how)
        assert torch.equal(together[row * n : (row + 1) * n], alone), name


def test_generate_batch_says_that_it_cannot_route():
    model = adapted()
    with pytest.raises(ValueError, match=r"cannot take adapter_names.*generate\(.*Engine.*set_task"):
        model.generate_batch(inputs=[[1, 2], [3]], adapter_names=NAMES[:2])
    with alora_kernels.route([0, 1]), pytest.raises(ValueError, match="ids of `route`"):
        model.generate_batch(inputs=[[1, 2], [3]])


@pytest.mark.parametrize("wrap", [True, False])
def test_generate_inside_a_route_block(wrap):
    """The beams of a row share its id; the base model itself must be told how many there are."""
    model, ids = adapted(), tokens(2)
    how = {"attention_mask": torch.ones_like(ids), "num_beams": 3, "max_new_tokens": 3, "min_new_tokens": 3}
    wanted = model.generate(input_ids=ids, adapter_names=NAMES[:2], **how)
    if wrap:
        with alora_kernels.route([0, 1]):
            assert torch.equal(model.generate(input_ids=ids, **how), wanted)
        return
    with alora_kernels.route([0, 1]), pytest.raises(ValueError, match=r"batch has 6 rows.*route\(ids, repeats"):
        model.base_model.model.generate(input_ids=ids, **how)
    with alora_kernels.route([0, 1], repeats=3):
        assert torch.equal(model.base_model.model.generate(input_ids=ids, **how), wanted)


def test_a_vision_language_model_has_the_rows_of_its_text():
    model = adapted(llava(), target_modules=r".*language_model.*(q|v|up)_proj")
    ids, images = tokens(3, 9), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    ids[0, 2:6] = ids[2, 1:5] = IMAGE  # two images, in the first and the last row; four patches each
    mixed = logits(model, ids, pixel_values=images, adapter_names=NAMES)
    for row, image in ((0, images[:1]), (1, None), (2, images[1:])):
        alone = logits(model, ids[row : row + 1], pixel_values=image, adapter_names=NAMES[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="2 entries .* the batch has 3 rows"):
        model(input_ids=ids, pixel_values=images, adapter_names=NAMES[:2])


def test_an_encoder_with_a_saved_head():
    model = adapted(bert(), task_type="SEQ_CLS", modules_to_save=["classifier"])
    each_row_alone(model, {"input_ids": tokens(3)}, NAMES, rtol=1e-5, atol=1e-5)
    model.train()(input_ids=tokens(3), labels=torch.tensor([0, 1, 2]), adapter_names=NAMES).loss.backward()
    assert any("modules_to_save" in name for name in adapter_grads(model))


@pytest.mark.parametrize(
    ("names", "error", "text"),
    [
        (["math", "maths"], ValueError, "unknown task 'maths': valid tasks are math, code and __base__"),
        (["math", "default"], ValueError, "'default' is an adapter: choose it with set_adapter"),
        (["math"], ValueError, "adapter_names has 1 entries .* but the batch has 2 rows"),
        (["math"] * 3, ValueError, "adapter_names has 3 entries .* but the batch has 2 rows"),
        (torch.tensor([0]), ValueError, "1 entries"),
        (torch.tensor([0, 2]), ValueError, "task id 2 is out of range"),
        ([0, 5], ValueError, "unknown task 5"),
        (torch.tensor([0.0, 1.0]), TypeError, "float32"),
        ("math", TypeError, "one task name per row"),
    ],
)
def test_wrong_names_are_refused_and_leave_nothing_behind(names, error, text):
    model, ids = adapted(), tokens(2)
    for call in (model, model.generate):
        with pytest.raises(error, match=text):
            call(input_ids=ids, adapter_names=names)
    with pytest.raises(ValueError, match="says none"):
        model(input_ids=ids)
    assert not any(layer._forward_pre_hooks for layer in layers_of(model))


def test_an_exception_in_the_forward_ends_the_routing():
    model = adapted()
    with pytest.raises(IndexError):
        model(input_ids=tokens() + 1000, adapter_names=["math", "code"])
    with pytest.raises(ValueError, match="says none"):
        model(input_ids=tokens())


def test_no_ids_names_the_three_ways():
    with pytest.raises(ValueError, match=r"tasks math, code .*adapter_names.*alora_kernels\.route.*set_task"):
        adapted()(input_ids=tokens())


def test_one_task_needs_no_ids():
    model = adapted(tasks=["only"])
    assert torch.equal(logits(model, tokens()), logits(model, tokens(), adapter_names=["only", "only"]))


@pytest.mark.parametrize("task", [-1, 0, 1, 2])
def test_one_task_for_all_rows_is_grouped_without_a_sort(task):
    leading, device = torch.Size([2, 5]), torch.device("cpu")
    for got, expected in zip(
        ConstantRouting(task).groups(leading, 3, device), group_rows(torch.full((10,), task), 3), strict=True
    ):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


def test_set_task_is_the_default_until_cleared():
    model, ids = adapted(), tokens(2)
    wanted = logits(model, ids, adapter_names=["code", "code"])
    set_task(model, "code")
    assert torch.equal(wanted, logits(model, ids))
    assert torch.equal(wanted, logits(model, ids[:, :6]))
    with torch.inference_mode():
        inference = model(input_ids=ids).logits
    torch.testing.assert_close(inference, wanted)
    model.train()(input_ids=ids, labels=ids).loss.backward()  # what inference mode cached is not reused
    model.eval()
    assert not torch.equal(wanted, logits(model, ids, adapter_names=["math", "math"]))
    set_task(model, "__base__")
    torch.testing.assert_close(logits(model, ids), logits(llama(), ids))
    set_task(model, 0)
    assert torch.equal(logits(model, ids), logits(model, ids, adapter_names=["math", "math"]))
    set_task(model, None)
    with pytest.raises(ValueError, match="says none"):
        model(input_ids=ids)


def test_set_task_refuses_what_it_cannot_set():
    model = adapted()
    with pytest.raises(ValueError, match="unknown task 'x': valid tasks are math, code"):
        set_task(model, "x")
    with pytest.raises(ValueError, match="unknown adapter 'x': the model has default"):
        set_task(model, "math", adapter_name="x")
    with pytest.raises(ValueError, match="default has no tasks: its router chooses by itself"):
        set_task(adapted(routing="soft"), "math")
    with pytest.raises(ValueError, match="has no ALoRA layers"):
        set_task(llama(), "math")


def test_soft_routing_takes_no_names_and_has_a_router():
    model, ids = adapted(routing="soft"), tokens()
    assert not torch.allclose(logits(model, ids), logits(llama(), ids), atol=1e-3)
    with pytest.raises(
        ValueError, match="default has no tasks: its router chooses by itself, so leave adapter_names out"
    ):
        model(input_ids=ids, adapter_names=["math", "code"])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    grads = adapter_grads(model)
    assert all(g.abs().max() > 0 for n, g in grads.items() if "router" in n)
    assert sum("router" in n for n in grads) == len(layers_of(model))


def test_every_parameter_of_a_task_routed_model_gets_a_gradient():
    """What plain DistributedDataParallel asks for: no router, or any other parameter, without a gradient."""
    model = adapted().train()
    assert not any("router" in name for name, _ in model.named_parameters())
    model(input_ids=tokens(), labels=tokens(), adapter_names=["math", "math"]).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_base_model_refuses_adapter_names_instead_of_dropping_them():
    model = adapted(tasks=["only"])
    with pytest.raises(ValueError, match="argument of the model that get_peft_model returns"):
        model.base_model.model(input_ids=tokens(), adapter_names=["only", "only"])


def test_a_model_that_is_not_from_transformers():
    model: PeftModel = adapted(Mlp(), task_type=None, target_modules=["up", "down"])
    x = torch.randn(3, 8)
    each_row_alone(model, {"x": x}, NAMES)
    with pytest.raises(ValueError, match="but the batch has 3 rows"):
        model(x, adapter_names=["math"])


def test_compiled_model_is_correct():
    model, ids = adapted(llama(layers=1)), tokens(3)
    compiled = torch.compile(model, backend="eager")
    for names in (NAMES, NAMES[::-1], ["math"] * 3):
        torch.testing.assert_close(
            compiled(input_ids=ids, adapter_names=names).logits, model(input_ids=ids, adapter_names=names).logits
        )
    set_task(model, "code")
    torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
    set_task(model, "math")
    torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits)
