"""Attention per request: the same numbers as transformers' own, for models whose attention it is and for no others."""

from __future__ import annotations

import resource
import sys
from contextlib import closing, contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from truth import alone, merged_models

from alora_kernels.routing import route
from alora_kernels.serving import Engine, EngineConfig, Sampling, TaskStore, attention, batching
from alora_kernels.training import packing
from alora_kernels.tuner import ALoRALayer
from tests.support.adapters import alora_folder, tiny_base

TASKS = ("math", "code", "law")
GREEDY = Sampling(max_tokens=12, temperature=0)
SMALL = EngineConfig(max_batch=8, max_context=256, cache_tokens=2048, batch_tokens=64, page_size=16)
SIZES = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def model_of(config, **load):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, **load).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return alora_folder(tmp_path_factory.mktemp("adapter") / "three", tiny_base()[0], TASKS)


@contextmanager
def serving(folder, config=SMALL, base=None):
    plain, tokenizer = tiny_base()
    base = plain if base is None else base
    with closing(TaskStore.open(base, [folder], resident=4)) as store, Engine(base, tokenizer, store, config) as engine:
        yield engine


def prompts(engine):
    """Some longer than a step takes, so that their later parts read the cache; one of a single token."""
    return [engine.encode("some words " * length)[: max(length, 1)] for length in (1, 7, 30, 90, 150, 3, 64, 65)]


def answers(engine):
    ids = prompts(engine)
    return [done.token_ids for done in engine.generate(ids, [(*TASKS, None)[i % 4] for i in range(len(ids))], GREEDY)]


def test_prompts_in_parts_and_mixed_lengths_equal_each_request_alone(folder):
    merged = merged_models(folder, TASKS)
    with serving(folder) as engine:
        assert engine.model.config._attn_implementation == attention.NAME
        ids = prompts(engine)
        assert answers(engine) == [alone(merged[(*TASKS, None)[i % 4]], p) for i, p in enumerate(ids)]


@pytest.mark.parametrize("make", [LlamaConfig, Qwen3Config], ids=lambda config: config.__name__)
def test_every_step_computes_what_transformers_attention_does(tmp_path, make, monkeypatch):
    """Logits of all steps, with grouped heads, for a model with norms in its attention too."""
    folder = alora_folder(tmp_path / "a", model_of(make(**SIZES)), TASKS, base_name=None)
    steps, real = {}, batching.TaskBatching._sample
    for name in ("ours", "theirs"):
        seen = steps[name] = []

        def sample(self, scores, output_ids, seen=seen):
            seen.append(scores[0].clone())
            return real(self, scores, output_ids)

        with monkeypatch.context() as patch:
            patch.setattr(batching.TaskBatching, "_sample", sample)
            if name == "theirs":
                patch.setattr(attention, "why_not", lambda model: "not in this test")
            with serving(folder, base=model_of(make(**SIZES))) as engine:
                for length in (1, 9, 40, 100):  # one after the other: the steps of both are then the same
                    prompt = [3 + 7 * i % 300 for i in range(length)]
                    engine.generate([prompt], "law", Sampling(max_tokens=12, temperature=0, ignore_eos=True))
    assert len(steps["ours"]) == len(steps["theirs"]) > 40
    for ours, theirs in zip(steps["ours"], steps["theirs"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_numbers_that_are_not_finite_stay_with_their_request(folder, monkeypatch):
    """Under a mask they reach every row of the step."""
    steps, real = [], batching.TaskBatching._sample

    def sample(self, scores, output_ids):
        steps.append(scores[0].isfinite().all(1).tolist())
        return real(self, scores, output_ids)

    monkeypatch.setattr(batching.TaskBatching, "_sample", sample)
    with serving(folder) as engine:
        lease = engine.store.acquire("law")
        for layer in engine.model.modules():
            if isinstance(layer, ALoRALayer):
                layer.asymlora_A["serving"].weight.data[lease.slot] = float("nan")
        engine.store.release(lease)
        others = [engine.submit("go on", task, Sampling(max_tokens=200, temperature=0)) for task in ("math", "code")]
        next(iter(others[1]))
        assert "not finite" in (engine.submit("x", "law", GREEDY).result(60).error or "")
        assert [other.result(60).finish_reason for other in others] == ["length", "length"]
    assert any(any(step) and not all(step) for step in steps)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: model_of(LlamaConfig(**SIZES), attn_implementation="eager"), "attn_implementation='eager'"),
        (lambda: model_of(MistralConfig(**SIZES, sliding_window=8)), "within a window"),
        (
            lambda: model_of(Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1)),
            "sliding_attention",
        ),
    ],
    ids=["eager", "window", "layers of two kinds"],
)
def test_other_models_keep_their_attention(model, why):
    model = model()
    before = model.config._attn_implementation
    assert why in attention.why_not(model)
    assert model.config._attn_implementation == before


def test_a_model_that_computes_otherwise_with_it_keeps_its_own(monkeypatch):
    model = model_of(LlamaConfig(**SIZES))
    real = attention.segment_attention
    monkeypatch.setattr(attention, "segment_attention", lambda q, *rest, **more: real(q, *rest, **more) * 1.5)
    assert "logits differ" in attention.why_not(model)
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(attention, "segment_attention", real)
    assert attention.why_not(model) is None


@pytest.mark.parametrize("options", [{"softcap": 30.0}, {"position_bias": torch.zeros(1)}, {"sliding_window": 2}])
def test_what_would_change_scores_is_refused_by_name(options):
    q = torch.zeros(1, 2, 3, 4)
    module = torch.nn.Module()
    with (
        attention.attending(attention.segments_of([3], [3], None)),
        pytest.raises(attention.UnknownOptionError, match=next(iter(options))),
    ):
        attention._attend(module, q, q, q, None, **options)


def test_a_model_whose_soft_caps_would_be_left_out_is_refused():
    """transformers' eager attention has them, its paged one has not, and says nothing."""
    tokenizer = tiny_base()[1]
    capped = model_of(Gemma2Config(**SIZES, head_dim=8, layer_types=["full_attention"] * 2))
    with pytest.raises(ValueError, match="Gemma2ForCausalLM asks its attention for softcap"):
        Engine(capped, tokenizer, None, SMALL).start()
    assert capped.config._attn_implementation == "eager"
    free = model_of(Gemma2Config(**SIZES, head_dim=8, attn_logit_softcapping=None))
    with Engine(free, tokenizer, None, SMALL) as engine:
        assert engine.submit([5, 6], None, GREEDY).result(60).completion_tokens == 12


def test_the_model_has_its_own_attention_again(folder):
    with serving(folder) as engine:
        model = engine.model
        with pytest.raises(RuntimeError, match="an engine serves from this model"), route([0]):
            model(torch.tensor([[1, 2]]))
    assert model.config._attn_implementation == "sdpa"
    with route([0]):
        assert model(torch.tensor([[1, 2]])).logits.isfinite().all()


def test_a_cache_in_bfloat16_is_half_as_large_and_close(folder):
    config = EngineConfig(**{**SMALL.__dict__, "cache_dtype": "bfloat16"})
    caches, found = [], []
    for sizes in (SMALL, config):
        with serving(folder, sizes) as engine:
            found.append(answers(engine))
            caches.append(engine._admission.loop.batch_processor.cache)
    wide, narrow = caches
    assert narrow.dtype == torch.bfloat16 and wide.dtype == torch.float32
    assert narrow.cache_tensor.numel() <= 0.55 * wide.cache_tensor.numel()
    same = [a == b for ours, theirs in zip(*found) for a, b in zip(ours, theirs)]
    assert sum(same) > 0.5 * len(same)


def test_a_cache_dtype_needs_attention_per_request(folder):
    base = tiny_base()[0]
    base.set_attn_implementation("eager")
    config = EngineConfig(**{**SMALL.__dict__, "cache_dtype": "bfloat16"})
    wanted = pytest.raises(ValueError, match="cache_dtype='bfloat16' needs attention per request.*'eager'")
    with wanted, serving(folder, config, base):
        pass
    assert base.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="cache_dtype must be one of auto, bfloat16"):
        EngineConfig(cache_dtype="int8")


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_a_cache_takes_memory_as_it_fills(folder):
    config = EngineConfig(max_batch=8, max_context=256, cache_tokens=2**20, batch_tokens=64, page_size=16)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with serving(folder, config) as engine:
        answers(engine)
        size = engine._admission.loop.batch_processor.cache.cache_tensor.numel()
    assert size > 2**28 and (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < size / 2


def test_training_in_the_same_process_has_an_attention_of_another_name():
    """transformers' table is one for the process: the later of two would be called by both."""
    assert packing.NAME != attention.NAME
