"""What one bad client can send: each is refused for the stated reason, and the others' mean is exactly theirs."""

from __future__ import annotations

import io
import json
import pickle

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedMedian
from hypothesis import given, settings
from hypothesis import strategies as st
from wirefakes import (
    SPEC,
    ScriptedGrid,
    arrays_of,
    content,
    failing,
    guarded,
    honest,
    initial,
    messages,
    numbers,
    record,
    start,
    update,
)

from alora_kernels.federated import wire

KEY = "layer.B"


def npy(value: np.ndarray, save=np.save, **options) -> bytes:
    buffer = io.BytesIO()
    save(buffer, value, **options)
    return buffer.getvalue()


def header_only(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def declared(
    data: bytes, dtype: str = "float32", shape: tuple[int, ...] = (8, 4), stype: str = "numpy.ndarray"
) -> Array:
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


def full(value: float, shape: tuple[int, ...] = (8, 4), dtype: str = "float32") -> np.ndarray:
    return np.full(shape, value, dtype)


GOOD, ARCHIVE = npy(full(0.5)), npy(full(0.5), np.savez)
ARRAYS = [  # name, what stands in the place of layer.B [8, 4] float32, reason
    ("NaN", full(np.nan), "layer.B has values that are not finite"),
    ("inf", full(-np.inf), "layer.B has values that are not finite"),
    ("1e30", full(1e30), "L2 norm of the update is 5.66e+30, the cap is 6.63"),
    ("largest float32", full(np.finfo("float32").max), "L2 norm of the update is 1.92e+39, the cap is 6.63"),
    ("just too far", initial()[KEY] + 1.2, "L2 norm of the update is 6.79, the cap is 6.63"),
    ("broadcastable shape", full(0.5, (8, 1)), "layer.B has shape (8, 1), agreed is (8, 4)"),
    ("transposed", full(0.5, (4, 8)), "layer.B has shape (4, 8), agreed is (8, 4)"),
    ("scalar", np.array(0.5, "float32"), "layer.B has shape (), agreed is (8, 4)"),
    ("float64", full(0.5, dtype="float64"), "layer.B has dtype float64, agreed is float32"),
    ("int32", full(1, dtype="int32"), "layer.B has dtype int32, agreed is float32"),
    ("bfloat16", declared(b"\0" * 64, "bfloat16"), "layer.B has dtype bfloat16, agreed is float32"),
    ("lies about its dtype", declared(npy(full(0.5, dtype="float16"))), "layer.B decodes to float16 (8, 4)"),
    ("other byte order", declared(npy(full(0.5).astype(">f4"))), "layer.B decodes to >f4 (8, 4)"),
    ("lies about its shape", declared(npy(full(0.5, (8, 1)))), "layer.B decodes to float32 (8, 1)"),
    ("negative shape", declared(GOOD, shape=(-8, -4)), "layer.B has shape (-8, -4), agreed is (8, 4)"),
    ("endless shape", declared(GOOD, shape=(10**30, 4)), "layer.B has shape (1000000000000000000000000000000, 4)"),
    ("dtype that is none", declared(GOOD, dtype="(2,"), "layer.B has dtype (2,, agreed is float32"),
    ("garbage", declared(b"\x93not numpy"), "layer.B does not decode"),
    ("no bytes", declared(b""), "layer.B does not decode"),
    ("cut off", declared(GOOD[:-1]), "layer.B does not decode"),
    ("pickle", declared(pickle.dumps([1.0])), "layer.B does not decode"),
    ("array of objects", declared(npy(np.array([[1.0]], object), allow_pickle=True)), "layer.B does not decode"),
    ("zip archive", declared(ARCHIVE), "layer.B is an archive"),
    ("header of 4 PB", declared(header_only((10**15,))), "Unable to allocate"),
    ("other serialisation", declared(GOOD, stype="torch"), "Unsupported serialization type"),
    ("too many bytes", declared(GOOD + bytes(2000)), "layer.B has 2256 bytes, agreed are 128"),
]  # fmt: skip
LEFT, RIGHT = KEY + wire.LEFT, KEY + wire.RIGHT
KEYS = [  # name, changes of the honest arrays (None takes away), reason
    ("renamed key", {KEY: None, "layer.A": full(0.5)}, "keys differ: unexpected ['layer.A'], missing ['layer.B']"),
    ("extra key", {"layer.A": full(0.5)}, "keys differ: unexpected ['layer.A'], missing none"),
    ("missing key", {KEY: None}, "keys differ: unexpected none, missing ['layer.B']"),
    ("no keys", {KEY: None, "other.B": None}, "missing ['layer.B', 'other.B']"),
    ("one factor", {KEY: None, LEFT: full(0.1, (8, 2))}, "missing ['layer.B.right']"),
    ("factors and dense", {LEFT: full(0.1, (8, 2)), RIGHT: full(0.1, (2, 4))}, "unexpected ['layer.B']"),
    ("rank too large", {KEY: None, LEFT: full(0.1, (8, 5)), RIGHT: full(0.1, (5, 4))}, "factors of shape (8, 5)"),
    ("ranks differ", {KEY: None, LEFT: full(0.1, (8, 2)), RIGHT: full(0.1, (3, 4))}, "layer.B.right has shape (3, 4)"),
    ("factors that overflow", {KEY: None, LEFT: full(1e30, (8, 2)), RIGHT: full(1e30, (2, 4))}, "not finite"),
    ("factors of NaN", {KEY: None, LEFT: full(np.nan, (8, 2)), RIGHT: full(0, (2, 4))}, "not finite"),
]  # fmt: skip
METRICS = [  # name, changes of the honest metrics (None takes away), reason
    ("negative examples", {wire.EXAMPLES: -5}, "num-examples is -5, outside (0, 1000000]"),
    ("no examples", {wire.EXAMPLES: 0}, "num-examples is 0, outside (0, 1000000]"),
    ("1e12 examples", {wire.EXAMPLES: 1e12}, "num-examples is 1000000000000.0, outside (0, 1000000]"),
    ("2**200 examples", {wire.EXAMPLES: 2**200}, "outside (0, 1000000]"),
    ("2**5000 examples", {wire.EXAMPLES: 2**5000}, "num-examples is 1412"),
    ("NaN examples", {wire.EXAMPLES: float("nan")}, "num-examples is nan, not a finite number"),
    ("inf examples", {wire.EXAMPLES: float("inf")}, "num-examples is inf, not a finite number"),
    ("list of examples", {wire.EXAMPLES: [10, 10]}, "num-examples is a list, agreed is one number"),
    ("examples missing", {wire.EXAMPLES: None}, "metrics differ: unexpected none, missing ['num-examples']"),
    ("metric missing", {"after-loss": None}, "metrics differ: unexpected none, missing ['after-loss']"),
    ("metric too many", {"after-f1": 0.5}, "metrics differ: unexpected ['after-f1'], missing none"),
    ("NaN metric", {"after-loss": float("nan")}, "after-loss is nan, not a finite number"),
    ("list metric", {"after-loss": [0.5]}, "after-loss is a list, agreed is one number"),
]  # fmt: skip
HONEST_METRICS = MetricRecord(numbers())
RECORDS = [  # name, changes of the honest records (None takes away), reason
    ("no arrays", {wire.ARRAYS: None}, "lacks record 'arrays'; the reply of this train round has exactly"),
    ("no metrics", {wire.METRICS: None}, "lacks record 'metrics'"),
    ("no reply", {wire.REPLY: None}, "lacks record 'reply'"),
    ("second arrays", {"more": ArrayRecord()}, "has an unexpected record 'more'"),
    ("second metrics", {"more": HONEST_METRICS}, "has an unexpected record 'more'"),
    ("second config", {"more": ConfigRecord()}, "has an unexpected record 'more'"),
    ("other type", {wire.METRICS: ConfigRecord(numbers())}, "has an unexpected record 'metrics'"),
    ("reply without fields", {wire.REPLY: ConfigRecord()}, "nonce is not the one"),
]  # fmt: skip
WORDS = [  # name, what the reply says of itself, reason
    ("wrong nonce", {"nonce": "0" * 32}, "nonce is not the one this message was sent with"),
    ("wrong spec hash", {"spec_hash": "0" * 64}, "spec hash differs"),
    ("name of another", {"client": "client-1"}, "client name 'client-1' is taken by node 1 in this round"),
    ("empty name", {"client": ""}, "client must be a printable name of 1 to 100 characters"),
    ("name with a line", {"client": "a\nb"}, "client must be a printable name"),
    ("endless name", {"client": "a" * 101}, "client must be a printable name"),
    ("name that is a number", {"client": 7}, "client must be a printable name"),
]  # fmt: skip


def changed(base: dict, changes: dict) -> dict:
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


def with_arrays(changes):
    return lambda m: honest(m, arrays=record(changed(update(m, m.metadata.dst_node_id), changes)))


def with_records(changes):
    return lambda m: Message(RecordDict(changed(dict(content(m)), changes)), reply_to=m)


def with_metrics(changes):
    return lambda m: honest(m, metrics=changed(numbers(), changes))


def with_words(words):
    return lambda m: honest(m, **words)


def empty(message: Message) -> Message:
    reply = honest(message)
    reply.__dict__["_content"] = None
    return reply


TABLE = [
    *((name, with_arrays({KEY: value}), reason) for name, value, reason in ARRAYS),
    *((name, with_arrays(changes), reason) for name, changes, reason in KEYS),
    *((name, with_metrics(changes), reason) for name, changes, reason in METRICS),
    *((name, with_records(changes), reason) for name, changes, reason in RECORDS),
    *((name, with_words(words), reason) for name, words, reason in WORDS),
    ("error", failing("Traceback\n  somewhere\nValueError: no data"), "ValueError: no data"),
    ("error without words", failing(" \n"), "error 2 without a reason"),
    ("error of many words", failing("x" * 5000), "x" * 300),
    ("neither content nor error", empty, "ValueError: Message content is None"),
    ("no reply", lambda message: None, "no reply within 600 s"),
]


def updates_of(nodes) -> list[dict[str, np.ndarray]]:
    """What the honest clients of these nodes reply."""
    return [update(message, message.metadata.dst_node_id) for message in messages(nodes)]


def mean_of(nodes) -> dict[str, np.ndarray]:
    """The mean as FedAvg takes it, of the honest clients of three nodes, equal weights."""
    updates = updates_of(nodes)
    return {key: sum(arrays[key] * (10 / 30) for arrays in updates) for key in updates[0]}


@pytest.mark.parametrize(("bad", "reason"), [pytest.param(bad, reason, id=name) for name, bad, reason in TABLE])
def test_is_refused_with_its_reason_and_the_mean_is_the_others(bad, reason, caplog):
    grid, events = guarded({1: honest, 2: honest, 3: bad, 4: honest})
    result = start(grid, 4)
    *clients, total = events
    assert [event["accepted"] for event in clients] == [True, True, False, True]
    assert reason in clients[2]["reason"] and len(clients[2]["reason"]) <= 300
    assert (total["accepted"], total["rejected"], total["void"]) == (3, 1, False)
    expected = mean_of([1, 2, 4])
    assert set(result.arrays) == set(expected)
    for key, array in result.arrays.items():
        np.testing.assert_array_equal(array.numpy(), expected[key], strict=True)
    lines = [r.getMessage() for r in caplog.records if r.name == "alora_kernels.federated"]
    assert len(lines) == 1 and "node 3, round 1: " + clients[2]["reason"] in lines[0] and "\n" not in lines[0]
    json.dumps(events, allow_nan=False)


@pytest.mark.parametrize("name", ["NaN", "1e30", "broadcastable shape", "pickle"])
def test_the_median_over_the_guard_is_the_others(name):
    value = next(value for case, value, _ in ARRAYS if case == name)
    grid, _ = guarded({1: honest, 2: honest, 3: with_arrays({KEY: value}), 4: honest})
    result = start(grid, 4, cls=FedMedian)
    updates = updates_of([1, 2, 4])
    for key, array in result.arrays.items():
        expected = np.median(np.stack([arrays[key] for arrays in updates]), axis=0)
        np.testing.assert_array_equal(array.numpy(), expected, strict=True)


def unguarded(bad) -> dict[str, np.ndarray]:
    """Flower's mean without a guard, of one honest and one bad client."""
    return arrays_of(start(ScriptedGrid({1: bad, 2: honest}), 2).arrays)


def test_without_the_guard_a_nan_is_the_mean():
    assert np.isnan(unguarded(with_arrays({KEY: full(np.nan)}))[KEY]).all()


def test_without_the_guard_a_shape_that_broadcasts_is_averaged():
    mean = unguarded(with_arrays({KEY: full(100.0, (8, 1))}))[KEY]
    assert mean.shape == (8, 4) and mean.min() > 40


def test_without_the_guard_a_negative_weight_takes_over():
    mean = unguarded(with_metrics({wire.EXAMPLES: -9}))[KEY]
    bad, honest_one = (arrays[KEY] for arrays in updates_of([1, 2]))
    np.testing.assert_allclose(mean, 10 * honest_one - 9 * bad, rtol=1e-4, atol=1e-5)


texts = st.text(max_size=8) | st.sampled_from([*SPEC.arrays, LEFT, RIGHT])
dimensions = st.integers(-(2**70), 2**70) | st.integers(0, 9)
odd_arrays = st.builds(
    Array,
    dtype=st.sampled_from(["float32", "float64", "bfloat16", "O", ""]) | st.text(max_size=4),
    shape=st.lists(dimensions, max_size=3).map(tuple) | st.just((8, 4)) | st.just((6, 2)),
    stype=st.sampled_from(["numpy.ndarray", "torch", ""]),
    data=st.binary(max_size=64) | st.sampled_from([GOOD, GOOD[:-3], npy(full(np.nan)), pickle.dumps(1), ARCHIVE]),
)
floats = st.floats(width=32) | st.floats(-1, 1, width=32)
well_typed = st.lists(floats, min_size=44, max_size=44).map(
    lambda values: record({KEY: np.array(values[:32], "float32").reshape(8, 4),
                           "other.B": np.array(values[32:], "float32").reshape(6, 2)})
)  # fmt: skip
odd_records = st.dictionaries(texts, odd_arrays, max_size=4).map(ArrayRecord) | well_typed
odd_numbers = st.floats() | st.integers() | st.lists(st.floats(), max_size=2)
odd_metrics = st.dictionaries(texts, odd_numbers, max_size=4) | st.builds(
    lambda values: dict(zip(sorted(SPEC.metric_keys("train")), values, strict=True)),
    st.lists(odd_numbers, min_size=5, max_size=5) | st.lists(st.floats(0.1, 10), min_size=5, max_size=5),
)


@settings(max_examples=150, deadline=None)
@given(arrays=odd_records, metrics=odd_metrics, extra=st.dictionaries(texts, odd_records, max_size=1))
def test_nothing_raises_and_nothing_gets_in_that_was_not_agreed(arrays, metrics, extra):
    def odd(message: Message) -> Message:
        reply = honest(message, arrays=arrays, metrics=metrics)
        reply.content.update(extra)
        return reply

    grid, events = guarded({1: honest, 2: honest, 3: odd})
    sent = initial()
    replies = grid.send_and_receive(messages([1, 2, 3]))
    assert [event["accepted"] for event in events[:2]] == [True, True]
    assert len(replies) == 2 + events[2]["accepted"]
    if events[2]["accepted"]:
        assert not extra
        got = arrays_of(replies[2].content["arrays"])
        assert {key: (str(a.dtype), a.shape) for key, a in got.items()} == dict(SPEC.arrays)
        assert all(np.isfinite(value).all() for value in got.values())
        exact = sum(((got[key].astype(float) - sent[key]) ** 2).sum() for key in got)
        assert exact <= 44 * (1 + 1e-12)
        assert set(metrics) == SPEC.metric_keys("train") and 0 < metrics[wire.EXAMPLES] <= 1_000_000


@settings(max_examples=100, deadline=None)
@given(records=st.dictionaries(texts, odd_records | odd_metrics.map(MetricRecord), max_size=3), node=st.integers())
def test_random_replies_never_raise_and_never_get_in(records, node):
    def odd(message: Message) -> Message:
        reply = Message(RecordDict(records), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = node
        return reply

    grid, events = guarded({1: honest, 2: honest, 3: odd})
    assert len(grid.send_and_receive(messages([1, 2, 3]))) == 2
    assert [event["accepted"] for event in events[:2]] == [True, True]
    assert not any(event["accepted"] for event in events[2:-1])
