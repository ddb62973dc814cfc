"""The names of transformers' continuous batching that `serving.batching` and `attention` rely on: which one changed."""

from __future__ import annotations

import ast
import inspect
import tomllib
from functools import reduce
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from transformers.generation.continuous_batching import continuous_api, requests
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.model_runner import ModelRunner
from transformers.generation.continuous_batching.scheduler import Scheduler

from alora_kernels.serving.batching import EngineConfig, cache_config
from tests.support.adapters import tiny_base

REPOSITORY = Path(__file__).parent.parent.parent
MANAGER, PROCESSOR = continuous_api.ContinuousBatchingManager, continuous_api.ContinuousBatchProcessor

#: what is overridden, replaced or called, with the arguments it is given or passes on, in their order
METHODS = [
    (MANAGER, "__init__", "model generation_config continuous_batching_config"),
    (MANAGER, "add_request", "input_ids request_id max_new_tokens streaming eos_token_id"),
    (MANAGER, "is_running", ""),
    (MANAGER, "stop", "block hard_stop"),
    (MANAGER, "_run_generation_loop", ""),
    (MANAGER, "_create_batch_processor", ""),
    (MANAGER, "_generation_loop_body", "batch_processor bootstrapping"),
    (MANAGER, "_generation_step", ""),
    (PROCESSOR, "_handle_request_error", "error state"),
    (continuous_api.OutputRouter, "__init__", ""),
    (continuous_api.OutputRouter, "deliver", "output"),
    (continuous_api.OutputRouter, "deliver_batch", "outputs"),
    (
        ContinuousBatchingIOs,
        "prepare_batch_tensors",
        "requests_in_batch logits_processors use_decode_fast_path num_q_tokens max_kv_read use_padding",
    ),
    (ModelRunner, "_sample", "scores output_ids"),
    (ModelRunner, "compute_batch", "model batch_data"),
    (Scheduler, "finish_request", "request_id"),
    (Scheduler, "set_request_cancellation", "request_id"),
    (requests.GenerationOutput, "is_finished", ""),
]

#: what is read or set, from a manager and its processor
ATTRIBUTES = {
    "manager.background_thread_status": ("fatal_error",),
    "manager": ("batch_processor", "logit_processor", "output_router", "_generation_thread"),
    "processor.inputs_and_outputs": (
        "compute_stream",
        "max_requests_per_batch",
        "num_q_tokens",
        "num_request_in_batch",
        "output_ids",
        "read_index_storage",
        "requests_in_batch",
        "true_read_sizes",
    ),
    "processor.cache": ("cache_allocators", "layer_to_allocator"),
    "allocator": ("_kv_token_views", "index"),
    "processor": ("max_batch_tokens", "use_async_batching"),
    "processor.model_runner": (
        "_model_supports_logits_to_keep",
        "pad_inputs",
        "use_cuda_graph_decode",
        "use_cuda_graph_varlen",
    ),
    "processor.scheduler": ("active_requests", "waiting_requests"),
    "state": ("position_offset", "request_id", "tokens_to_process"),
    "future": ("has_new_token", "query_length", "state"),
    "output": ("error", "generated_tokens", "request_id", "status"),
    "status": ("FAILED",),
}


def changed(name: str, how: str) -> str:
    return f"transformers {transformers.__version__}: {name} {how}, which alora_kernels/serving relies on"


@pytest.mark.parametrize(("owner", "name", "arguments"), METHODS, ids=lambda value: getattr(value, "__name__", value))
def test_a_method_that_batching_overrides_or_calls(owner, name, arguments):
    member = getattr(owner, name, None)
    title = f"{owner.__name__}.{name}"
    assert callable(member), changed(title, "is gone")
    wanted = arguments.split()
    found = [argument for argument in inspect.signature(member).parameters if argument in wanted]
    assert found == wanted, changed(title, f"takes {inspect.signature(member)} and not {', '.join(wanted)} in order")


@pytest.fixture(scope="module")
def parts():
    model = tiny_base()[0]
    generation = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1)
    manager = MANAGER(model, generation, cache_config(EngineConfig(2, max_context=32).resolved(model)))
    state = requests.RequestState(request_id="one", initial_tokens=[1, 2])
    processor = manager._create_batch_processor()
    return {
        "manager": manager,
        "processor": processor,
        "state": state,
        "future": requests.FutureRequestState(state, has_new_token=True, complete_blocks={}, query_length=2),
        "output": requests.GenerationOutput(request_id="one"),
        "status": requests.RequestStatus,
        "allocator": processor.cache.layer_to_allocator[0],
    }


@pytest.mark.parametrize(("where", "name"), [(where, name) for where, names in ATTRIBUTES.items() for name in names])
def test_an_attribute_that_batching_reads_or_sets(parts, where, name):
    first, *rest = where.split(".")
    try:
        reduce(getattr, [*rest, name], parts[first])
    except AttributeError as error:
        pytest.fail(changed(f"{where}.{name}", f"is gone ({error})"))


def test_the_settings_mean_what_they_say(parts):
    config = parts["manager"].continuous_batching_config
    assert parts["processor"].use_async_batching is False and config.allow_block_sharing is False
    assert config.use_cuda_graph in (False, (False, False)) and parts["processor"].max_batch_tokens >= 2
    graphs = cache_config(EngineConfig(cuda_graphs=True, cache_tokens=4096))
    assert graphs.cuda_graph_booleans == (True, True) and graphs.kv_padding_interval_size > 0


def test_flash_attention_reads_pages_itself_only_where_it_can():
    """Its paged kernel refuses pages that are no multiple of 256."""
    pages = {size: cache_config(EngineConfig(page_size=size)).max_blocks_per_request for size in (32, 256, 300, 512)}
    assert pages == {32: 0, 256: None, 300: 0, 512: None}


def test_the_cache_writes_and_reads_where_attention_does(parts):
    """Keys of place p are row p of a layer's view: what transformers' own update puts there."""
    allocator = parts["allocator"]
    keys, values = allocator._kv_token_views[0]
    new = torch.randn(2, *keys.shape[1:])
    allocator.update(new, -new, 0, torch.tensor([], dtype=torch.int64), torch.tensor([5, 3]))
    torch.testing.assert_close(keys[[5, 3]], new)
    torch.testing.assert_close(values[[5, 3]], -new)


def test_no_other_module_touches_them():
    private = {name for _, name, _ in METHODS if name.startswith("_") and not name.startswith("__")}
    private |= {name for names in ATTRIBUTES.values() for name in names if name.startswith("_")}
    for file in sorted([*REPOSITORY.glob("alora_kernels/**/*.py"), *REPOSITORY.glob("bench/**/*.py")]):
        if file.name in ("attention.py", "batching.py") and file.parent.name == "serving":
            continue
        text = file.read_text()
        assert "continuous_batching.continuous_api" not in text and "continuous_batching.requests" not in text, file
        names = {node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)}
        assert not (names & private) - {"_sample"}, file  # a word that others have too


def test_the_package_names_the_versions_it_was_run_with():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    tested = next(one for one in map(Requirement, project["dependencies"]) if one.name == "transformers")
    assert tested.specifier.contains(transformers.__version__), changed("the version", f"is not in {tested.specifier}")
