"""An adapter on the output layer, as PEFT saves it: the layer sees fewer rows than the model was given tokens."""

from __future__ import annotations

import pytest
from peft import PeftModel
from truth import alone

from alora_kernels import set_task
from alora_kernels.serving import Engine, EngineConfig, Sampling, TaskStore
from tests.support.adapters import alora_folder, tiny_base

TASKS = ("math", "code", "law")
GREEDY = Sampling(max_tokens=12, temperature=0)
SMALL = EngineConfig(max_batch=8, max_waiting=64, max_context=128, cache_tokens=1024, batch_tokens=64, page_size=16)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word:UserWarning")
def test_a_mixed_batch_equals_each_request_alone(tmp_path):
    first = alora_folder(tmp_path / "first", tiny_base()[0], TASKS, target_modules=["q_proj", "lm_head"])
    model = PeftModel.from_pretrained(tiny_base()[0], first)
    model.save_pretrained(tmp_path / "stock")  # with lm_head's own weight beside its adapter
    base, tokenizer = tiny_base()
    assert base.config.tie_word_embeddings  # the adapter is for the output only
    engine = Engine(base, tokenizer, TaskStore.open(base, [tmp_path / "stock"], resident=4), SMALL).start()
    try:
        ids = [engine.encode(f"request number {i} says" + " again and again" * (i % 5)) for i in range(12)]
        tasks = [(*TASKS, None)[i % 4] for i in range(12)]
        done = engine.generate(ids, tasks, GREEDY)
    finally:
        engine.stop()
        engine.store.close()
    wanted = []
    for prompt, task in zip(ids, tasks, strict=True):  # unmerged: a merge would change the input embeddings too
        set_task(model, task or "__base__")
        wanted.append(alone(model, prompt))
    assert [c.token_ids for c in done] == wanted
    set_task(model, "__base__")
    assert sum(alone(model, prompt) != answer for prompt, answer in zip(ids, wanted, strict=True)) > 3  # the control
