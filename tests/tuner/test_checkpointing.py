"""Activation checkpointing: gradients are those without it, bit for bit, however it is turned on."""

from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import alora_kernels
from alora_kernels import keep_routing
from alora_kernels.tuner import set_task

from ..support.tiny import Mlp, adapted, adapter_grads, assert_same, gpt2, llama, no_dropout, tokens


def _enable_before(base, **kwargs):
    base.gradient_checkpointing_enable(**kwargs)
    return adapted(base)


def _enable_on_peft(base, **kwargs):
    model = adapted(base)
    model.gradient_checkpointing_enable(**kwargs)
    return model


def _turn_on(model):
    """By the method's new name, or by the one that older transformers 5 have."""
    return getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable


def _enable_on_base(base, **kwargs):
    model = adapted(base)
    _turn_on(model.base_model.model)(*kwargs.values())
    return model


def _enable_on_inner(base, **kwargs):
    model = adapted(base)
    _turn_on(model.base_model.model.base_model)(*kwargs.values())
    return model


WAYS = [_enable_before, _enable_on_peft, _enable_on_base, _enable_on_inner]


def _two_forwards(model):
    """Two forwards with different ids, the second one by another way, before one backward."""
    model.train()
    first = model(input_ids=tokens(), labels=tokens(), adapter_names=["math", "code"]).loss
    with alora_kernels.route([1, -1]):
        second = model(input_ids=tokens(seed=5), labels=tokens(seed=5)).loss
    (first + 2 * second).backward()
    return adapter_grads(model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", [llama, gpt2])
def test_gradients_are_bit_identical(way, base, recomputed):
    wanted = _two_forwards(adapted(no_dropout(base())))
    model = way(no_dropout(base()))
    assert_same(wanted, _two_forwards(model))
    assert recomputed(model, adapter_names=["math", "code"])


@pytest.fixture
def recomputed():
    """Whether a forward and a backward run the first layer twice."""

    def check(model, **kwargs) -> bool:
        calls = []
        hooked = next(m for n, m in model.named_modules() if n.endswith(("q_proj", "c_attn")))
        handle = hooked.register_forward_pre_hook(lambda *_: calls.append(1))
        model.train()(input_ids=tokens(), labels=tokens(), **kwargs).loss.backward()
        handle.remove()
        return len(calls) == 2

    return check


@pytest.mark.parametrize(
    ("settings", "names"), [({"lora_dropout": 0.3}, {"adapter_names": ["math", "code"]}), ({"routing": "soft"}, {})]
)
def test_with_dropout_and_kwargs_and_soft_routing(settings, names):
    def run(checkpointed):
        model = adapted(**settings).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"preserve_rng_state": True})  # use_reentrant left out
        torch.manual_seed(5)
        model(input_ids=tokens(), labels=tokens(), **names).loss.backward()
        return adapter_grads(model)

    assert_same(run(False), run(True))


def test_state_changed_between_forward_and_backward():
    def run(checkpointed):
        model = adapted().train()
        torch.manual_seed(4)
        model.add_adapter("other", model.peft_config["default"])
        if checkpointed:
            model.gradient_checkpointing_enable()
        set_task(model, "math")
        loss = model(input_ids=tokens(), labels=tokens()).loss
        set_task(model, "code")
        loss = loss + 3 * model(input_ids=tokens(), labels=tokens()).loss
        set_task(model, None)
        loss.backward()
        return adapter_grads(model)

    assert_same(run(False), run(True))


@pytest.mark.parametrize("way", WAYS)
def test_reentrant_is_refused_with_the_remedy(way):
    model = way(llama(), gradient_checkpointing_kwargs={"use_reentrant": True}).train()
    with pytest.raises(ValueError, match=r"use_reentrant.*False"):
        model(input_ids=tokens(), labels=tokens(), adapter_names=["math", "code"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_plain_checkpoint_is_refused_in_the_backward(reentrant):
    model = adapted(Mlp(), task_type=None, target_modules=["up", "down"]).train()
    x = torch.randn(2, 8, requires_grad=True)
    with alora_kernels.route([0, 1]):
        y = checkpoint(model.base_model.model, x, use_reentrant=reentrant)
    with alora_kernels.route([1, 0]), pytest.raises(RuntimeError, match="keep_routing"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_plain_checkpoint_is_exact_with_keep_routing(reentrant):
    def run(checkpointed):
        model = adapted(Mlp(), task_type=None, target_modules=["up", "down"]).train()
        x = torch.ones(2, 8, requires_grad=True)
        with alora_kernels.route([0, 1]):
            inner = model.base_model.model
            y = checkpoint(keep_routing(inner), x, use_reentrant=reentrant) if checkpointed else inner(x)
        with alora_kernels.route([1, 0]):
            z = checkpoint(keep_routing(inner), 2 * x, use_reentrant=reentrant) if checkpointed else inner(2 * x)
        (y.sum() + z.square().sum()).backward()
        return adapter_grads(model)

    assert_same(run(False), run(True))


def test_copies_of_a_checkpointing_model():
    model = _enable_on_peft(llama())
    wanted = _two_forwards(model)
    copy = deepcopy(model)
    copy.zero_grad()
    assert_same(wanted, _two_forwards(copy))
    # transformers hooks the embeddings with a local function, which pickle refuses; the rest pickles
    model.base_model.model.disable_input_require_grads()
    copy = pickle.loads(pickle.dumps(model))
    copy.enable_input_require_grads()
    copy.zero_grad()
    assert_same(wanted, _two_forwards(copy))


def test_unloading_gives_back_the_plain_function():
    model = _enable_on_peft(llama())
    _two_forwards(model)
    base = model.unload()
    assert not base._forward_pre_hooks
    assert not any(
        type(getattr(m, "_gradient_checkpointing_func", None)).__module__.startswith("alora") for m in base.modules()
    )
    base.train()(input_ids=tokens(), labels=tokens()).loss.backward()


def test_compiled_and_checkpointed():
    wanted = _two_forwards(adapted(llama(layers=1)))
    model = _enable_on_peft(llama(layers=1))
    compiled = torch.compile(model, backend="eager")
    got = {n.removeprefix("_orig_mod.base_model.model."): g for n, g in _two_forwards(compiled).items()}
    assert wanted.keys() == got.keys()
    for name in wanted:
        torch.testing.assert_close(wanted[name], got[name])


def test_trainer_turns_it_on(tmp_path, recomputed):
    from transformers import Trainer, TrainingArguments

    class Routed(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            out = model(input_ids=inputs["input_ids"], labels=inputs["input_ids"], adapter_names=inputs["task"])
            return (out.loss, out) if return_outputs else out.loss

    rows = [{"input_ids": row, "task": torch.tensor(i % 2)} for i, row in enumerate(tokens(4))]

    def run(checkpointed):
        model = adapted()
        arguments = TrainingArguments(
            tmp_path, max_steps=2, per_device_train_batch_size=2, gradient_checkpointing=checkpointed, use_cpu=True,
            remove_unused_columns=False, report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        Routed(model, arguments, train_dataset=rows).train()
        return model, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    (_, wanted), (model, got) = run(False), run(True)
    assert_same(wanted, got)
    assert recomputed(model, adapter_names=["math", "code"])
