"""transformers' continuous batching, with a task, settings and random numbers for every request.

The loop looks requests up in the `RequestTable` and tells it their tokens. Three things are put into transformers'
manager, each where the batch is already known:
- the slots of the batch's tokens are written into one static buffer when its tensors are prepared, so every layer reads
  its row groups from the same ids, and a replayed CUDA graph reads the new ones;
- tokens are chosen row by row (`sampling.choose`), after the step: what it runs may be a graph that was captured for
  another batch, so it leaves its scores in a static buffer and knows nothing of the requests' settings;
- a step that raises, or whose logits are not finite, is repeated request by request: only the one at fault fails.

On CPUs each request attends to its own keys (`attention`), and the cache takes memory as it fills.

KV blocks are never shared between requests: transformers finds equal prefixes by their tokens alone, and the keys and
values of equal tokens differ between tasks.

This and `attention` are the modules that touch names which transformers does not document.
tests/serving/test_batching_contract.py names each of them, and which one changed; the extra `serving` says for which
versions it was run.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousBatchProcessor,
    OutputRouter,
)
from transformers.generation.continuous_batching.requests import FutureRequestState, GenerationOutput, RequestStatus

from ..ops.attention import Segments
from ..routing import route
from ..tuner.layer import ALoRALayer
from . import attention
from .layer import StepRouting
from .request import Sampling
from .sampling import Row, choose, log_probabilities

if TYPE_CHECKING:
    from .openmp import Threads
    from .request_table import RequestTable, Run

log = logging.getLogger("alora_kernels.serving")
GONE = Row(Sampling(temperature=0), float)  # a request that ended while its last batch was on its way
BASE_SLOT = -1  # the base model alone
LONGEST = 4096  # tokens of context without being asked for more
PER_REQUEST = 512  # cached tokens per request of a batch, if not said otherwise
GRAPH_DEVICES = {"cuda"}  # torch calls ROCm's so, too
CACHE_DTYPES = {"auto": None, "bfloat16": torch.bfloat16}
READ_STEP = 4096  # a captured step reads the cache in multiples of it: fewer graphs, or less that is read in vain
FLASH_PAGE = 256  # flash attention's own paged kernel takes pages of a multiple


@dataclass(frozen=True)
class EngineConfig:
    """Sizes of an engine; a ValueError if one is too small, or the cache smaller than one request may need.

    When the cache is full, a request gives up its blocks and is computed again later.
    """

    max_batch: int = 32  # requests that run at once
    max_waiting: int = 256  # requests that may wait; one more is refused
    max_context: int | None = None  # tokens of prompt and answer together; None: the model's limit, 4096 at most
    cache_tokens: int | None = None  # of all requests together; None: 512 times max_batch, at least max_context
    batch_tokens: int = 512  # of one step; a longer prompt is read in several, between which others go on
    page_size: int = 32  # tokens per block of the cache
    cache_dtype: str = "auto"  # of cached keys and values: "bfloat16", or "auto", the model's
    cuda_graphs: bool = False  # steps are captured once per padded size and replayed: less Python, some padding

    def __post_init__(self) -> None:
        if self.cache_dtype not in CACHE_DTYPES:
            raise ValueError(f"cache_dtype must be one of {', '.join(CACHE_DTYPES)}, got {self.cache_dtype!r}")
        for name, value in dataclasses.asdict(self).items():
            least = {"max_context": 2, "page_size": 4}.get(name, 1)
            if type(value) is int and value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")

    def check_device(self, device: torch.device) -> None:
        """Raise a ValueError if the engine cannot be what it is told to be on this device."""
        if self.cuda_graphs and device.type not in GRAPH_DEVICES:
            raise ValueError(
                f"cuda_graphs (--cuda-graphs) replays the launches of a CUDA or ROCm GPU, and {device.type} has none:"
                " leave it off"
            )

    def resolved(self, model: Any) -> EngineConfig:
        """The same with every size known, for this model; a ValueError if sizes and model do not go together."""
        self.check_device(model.device)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LONGEST
        context = self.max_context or min(limit, LONGEST)
        if context > limit:
            raise ValueError(f"max_context is {context} but the model reads at most {limit} tokens")
        cache = self.cache_tokens or max(context, PER_REQUEST * self.max_batch)
        if cache < context:
            raise ValueError(
                f"cache_tokens is {cache}, less than one request of max_context={context} needs: raise the one or lower"
                " the other"
            )
        batch = max(self.batch_tokens, self.max_batch)
        return dataclasses.replace(self, max_context=context, cache_tokens=cache, batch_tokens=batch)


def cache_config(sizes: EngineConfig) -> ContinuousBatchingConfig:
    """transformers' settings for a loop of these sizes, in the words of the installed version."""
    known = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
    page, cache = sizes.page_size, sizes.cache_tokens
    settings: dict[str, Any] = {
        ("page_size" if "page_size" in known else "block_size"): page,
        "num_blocks": -(-cache // page) if cache else None,
        "max_batch_tokens": sizes.batch_tokens,
        "max_requests_per_batch": sizes.max_batch,
        "allow_block_sharing": False,
        "use_async_batching": False,  # the ids of a batch are written for the step that follows at once
        "use_cuda_graph": sizes.cuda_graphs,
        "kv_padding_interval_size": READ_STEP,
        "max_blocks_per_request": None if page % FLASH_PAGE == 0 else 0,
        "auto_switch_to_flash": False,
    }
    return ContinuousBatchingConfig(**{name: value for name, value in settings.items() if name in known})


class _Outputs(OutputRouter):
    """Gives outputs to the table at once instead of a queue."""

    def __init__(self, table: RequestTable) -> None:
        super().__init__()
        self._table = table

    def deliver(self, output: GenerationOutput) -> None:
        error = (output.error or "the request failed") if output.status == RequestStatus.FAILED else None
        self._table.output(output.request_id, output.generated_tokens, output.is_finished(), error)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            self.deliver(output)


class Before(NamedTuple):
    """A request as it was before its batch was prepared, to do that again."""

    future: FutureRequestState
    tokens: list[int]
    position: int


class _ModelOfDtype:
    """A model for those who read its dtype to lay out a cache, in another dtype."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        self._model, self.dtype = model, dtype

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _ZerosAsTheyAreTouched(TorchFunctionMode):
    """Bytes of zeros on the CPU come from the system, which gives memory when it is first written to."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_cpu = torch.device(kwargs.get("device") or "cpu").type == "cpu"
        if function is torch.zeros and kwargs.get("dtype") == torch.uint8 and on_cpu:
            return torch.from_numpy(numpy.zeros(args, dtype=numpy.uint8))
        return function(*args, **kwargs)


class TaskBatching(ContinuousBatchingManager):
    """The manager of one generation loop, which runs in a thread of its own from here on and tells the table.

    Its products take as many threads as `threads` says.

    Raises:
        ValueError: a `cache_dtype` for a model whose attention is not per request; a model whose attention would be
            computed without what it asks for, such as soft caps.
    """

    def __init__(self, model: PreTrainedModel, sizes: EngineConfig, table: RequestTable, threads: Threads) -> None:
        generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1)  # each request brings its own
        attention.give_back(model)  # of a loop that died
        self._masked = attention.why_not(model)  # the reason why all requests meet under a mask
        self._cache_dtype = CACHE_DTYPES[sizes.cache_dtype]
        if self._cache_dtype is not None and self._masked is not None:
            raise ValueError(
                f"cache_dtype={sizes.cache_dtype!r} needs attention per request, which this model does not get:"
                f" {self._masked}. Leave it 'auto'"
            )
        if (option := attention.left_out(model)) is not None:
            raise ValueError(
                f"{type(model).__name__} asks its attention for {option}, which transformers' continuous batching with"
                " eager attention leaves out: its answers would be wrong. On a GPU load it with"
                " attn_implementation='flash_attention_2'"
            )
        super().__init__(model, generation, cache_config(sizes))  # type: ignore[arg-type]  # their protocol is not ours
        if self._masked is None:
            attention.take(model)
        log.debug("attention is %s", f"under a mask: {self._masked}" if self._masked else "per request")
        self.output_router = _Outputs(table)
        self._table = table
        self._segments: Segments | None = None
        self._threads = threads
        self._task_ids = torch.empty(0)  # [max_batch_tokens], once the cache is there
        self._scores: Tensor | None = None  # [max_batch, V], once a step has some
        self._before: list[Before] = []
        self._tokens = 0
        thread = threading.Thread(target=self._run_generation_loop, name="alora-generation", daemon=True)
        self._generation_thread: threading.Thread | None = thread  # type: ignore[assignment]  # theirs: no daemon
        thread.start()

    def add(self, run: Run) -> bool:
        """Take a request into the loop; False if the loop is dead."""
        taken = self.add_request(
            run.prompt,
            request_id=run.generation.id,
            max_new_tokens=run.row.sampling.max_tokens,
            streaming=True,
            eos_token_id=-1 if run.row.sampling.ignore_eos else [*self._table.eos, *run.ends],
        )
        return taken is not None

    @property
    def cause(self) -> Exception | None:
        """What the loop died of."""
        return self.background_thread_status.fatal_error

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values running requests hold."""
        if self.batch_processor is None:
            return 0
        return sum(state.position_offset for state in list(self.batch_processor.scheduler.active_requests.values()))

    def _create_batch_processor(self) -> ContinuousBatchProcessor:
        model: Any = self.model
        try:
            if self._cache_dtype is not None:
                self.model = _ModelOfDtype(model, self._cache_dtype)  # type: ignore[assignment]
            with _ZerosAsTheyAreTouched():
                processor = super()._create_batch_processor()
        finally:
            self.model = model
        if processor.use_async_batching:
            raise RuntimeError("task ids are written for one batch at a time: asynchronous batching must be off")
        self._task_ids = torch.full(
            (processor.max_batch_tokens,), BASE_SLOT, dtype=torch.int32, device=self.model.device
        )
        self._processor = processor
        self._io: Any = processor.inputs_and_outputs  # the batch's tensors; synchronous, as just checked
        self._prepare = self._io.prepare_batch_tensors
        self._io.prepare_batch_tensors = self._prepare_batch_tensors  # type: ignore[method-assign]
        runner: Any = processor.model_runner
        runner._sample = self._sample
        self._compute = runner.compute_batch
        runner.compute_batch = self._compute_batch
        if isinstance(model.get_output_embeddings(), ALoRALayer):
            runner._model_supports_logits_to_keep = False  # ids are per token: it must see all of them
        return processor

    def stop(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; the model has its own attention again, torch its threads."""
        super().stop(*args, **kwargs)
        attention.give_back(self.model)  # type: ignore[arg-type]
        self._threads.stop()

    def _prepare_batch_tensors(self, requests_in_batch: list[FutureRequestState], *args: Any, **kwargs: Any) -> None:
        """As transformers does; the batch is kept in `_before`, and its slots are written into the static buffer."""
        self._before = [
            Before(future, list(future.state.tokens_to_process), future.state.position_offset)
            for future in requests_in_batch
        ]
        slots: list[int | None] = []  # whoever is in a batch has one
        for future in requests_in_batch:
            run = self._table.running.get(future.state.request_id)  # one that just ended may be in one more batch
            slots += [BASE_SLOT if run is None or run.lease is None else run.lease.slot] * future.query_length
        self._prepare(requests_in_batch, *args, **kwargs)
        self._tokens = len(slots)
        padded = self._io.num_q_tokens
        slots += [BASE_SLOT] * (padded - len(slots))
        # blocking, after all of the batch: a GPU's step runs on a stream of its own, which waits for no other
        self._task_ids[:padded].copy_(torch.tensor(slots, dtype=torch.int32))
        if self._masked is None:
            self._segments = self._segments_of(requests_in_batch)

    def _segments_of(self, requests_in_batch: list[FutureRequestState]) -> Segments:
        """Whose attention is whose, once the batch is prepared; full attention has one group of layers."""
        io = self._io
        read = io.true_read_sizes[0]  # 0: nobody has a past
        return attention.segments_of(
            [future.query_length for future in requests_in_batch],
            [future.state.position_offset for future in requests_in_batch],
            io.read_index_storage[0, :read] if read else None,
        )

    def _generation_loop_body(self, batch_processor: ContinuousBatchProcessor, bootstrapping: bool) -> bool:
        """One iteration; then what the table has ended meanwhile is cancelled."""
        self._before, self._tokens = [], 0
        go_on = super()._generation_loop_body(batch_processor, bootstrapping)
        scheduler = batch_processor.scheduler
        inside = {*scheduler.active_requests, *scheduler.waiting_requests}
        for ended in self._table.stepped(inside, self._tokens, len(self._before)):
            scheduler.set_request_cancellation(ended)
        return go_on

    def _generation_step(self) -> None:
        try:
            self._routed_step()
        except Exception as error:  # whatever a batch can raise: memory, a kernel, a broken task
            self._one_by_one(error)

    def _routed_step(self) -> None:
        rows = self._io.num_q_tokens
        slots = StepRouting(self._task_ids[:rows].view(1, rows))
        with self._threads.step(), route(slots), attention.attending(self._segments):
            super()._generation_step()

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        """Leave the scores `[1, n, V]` of the rows that get a token where `_compute_batch` reads them."""
        if self._scores is None:
            self._scores = scores.new_empty(self._io.max_requests_per_batch, scores.shape[-1])
        self._scores[: scores.shape[1]].copy_(scores[0])

    def _compute_batch(self, model: Any, batch: dict[str, Any]) -> None:
        """As transformers does, then next tokens for the rows that get one, into `output_ids[0, :n]`.

        NaN fail the step: where attention is under a mask, those of one request reach all others.
        """
        runner, stream = self._processor.model_runner, self._io.compute_stream
        try:
            self._compute(model, batch)
        except Exception as error:
            if runner.use_cuda_graph_varlen:  # it would be tried, and the batch repeated one by one, at every step
                log.warning("steps run without CUDA graphs from now on, since one could not be captured: %s", error)
                runner.pad_inputs = runner.use_cuda_graph_varlen = runner.use_cuda_graph_decode = False
            raise
        ids = [before.future.state.request_id for before in self._before if before.future.has_new_token]
        runs = [self._table.running.get(id) for id in ids]
        rows = [GONE if run is None else run.row for run in runs]
        assert self._scores is not None
        with nullcontext() if stream is None else torch.get_device_module(stream.device).stream(stream):
            tokens = choose(self._scores[: len(rows)], rows)
            self._io.output_ids[0, : len(rows)].copy_(tokens)
            self._tell_scores(runs, tokens)

    def _tell_scores(self, runs: Sequence[Run | None], tokens: Tensor) -> None:
        """Log probabilities for the requests that ask for them; `tokens` are those of this step."""
        counts: dict[int, int] = {
            i: run.row.sampling.logprobs
            for i, run in enumerate(runs)
            if run is not None and run.row.sampling.logprobs is not None
        }
        if not counts or self._scores is None:
            return
        index = torch.tensor(list(counts), device=tokens.device)
        found = log_probabilities(self._scores[index], tokens[index], max(counts.values()))
        for (i, count), scores in zip(counts.items(), found):
            runs[i].score(scores[: 1 + count])  # type: ignore[union-attr]

    def _one_by_one(self, error: Exception) -> None:
        """The step again for each request alone; one that fails alone is failed, the others have their tokens.

        Writing the same keys and values to the same places again changes nothing.
        """
        io, batch, runner = self._io, self._before, self._processor.model_runner
        usual = runner.pad_inputs, runner.use_cuda_graph_varlen
        runner.pad_inputs = runner.use_cuda_graph_varlen = False  # the sizes of one request are seldom seen again
        done: list[FutureRequestState] = []
        tokens: list[int] = []
        for before in batch:
            state = before.future.state
            state.tokens_to_process, state.position_offset = list(before.tokens), before.position
            try:
                io.prepare_batch_tensors(
                    requests_in_batch=[before.future],
                    logits_processors=self.logit_processor,
                    use_decode_fast_path=False,
                    num_q_tokens=before.future.query_length,
                    max_kv_read=before.position,
                    use_padding=False,
                )
                self._routed_step()
            except Exception as own:
                own.__context__ = None if own is error else error
                self._processor._handle_request_error(own, state)
                self._processor.scheduler.finish_request(state.request_id)
                continue
            if before.future.has_new_token:
                tokens.append(int(io.output_ids[0, 0]))
            done.append(before.future)
        runner.pad_inputs, runner.use_cuda_graph_varlen = usual
        self._before = batch
        io.requests_in_batch, io.num_request_in_batch = done, len(done)
        io.output_ids[0, : len(tokens)] = torch.tensor(tokens, dtype=io.output_ids.dtype)
