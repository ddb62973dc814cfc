"""Models that are nobody's but the user's: batches in dicts, lists of lengths, one row, torch's padded encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from ..support.tiny import adapted, layers_of

NAMES = ["math", "code", "__base__"]
ROWS = torch.randn(3, 3, 8, generator=torch.Generator().manual_seed(1))  # as many steps as rows
LENGTHS = [3, 1, 2]


class TimeFirst(nn.Module):
    """Time first inside, as recurrent layers have it; `take` says how the batch is handed over."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.inner, self.rnn = nn.Linear(8, 8), nn.Linear(8, 8), nn.LSTM(8, 8)

    def forward(self, batch: Any, lengths: Any = None, options: Any = None) -> torch.Tensor:
        x = batch["x"] if isinstance(batch, dict) else batch[0] if isinstance(batch, tuple) else batch
        steps = torch.tanh(self.inner(torch.tanh(self.first(x)).transpose(0, 1)))
        if lengths is None:
            return self.rnn(steps)[0].transpose(0, 1)
        packed = nn.utils.rnn.pack_padded_sequence(steps, lengths, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], total_length=len(steps))[0].transpose(0, 1)


CALLS = {
    "tensor": lambda rows: ((ROWS[rows],), {}),
    "dict": lambda rows: (({"x": ROWS[rows]},), {}),
    "named dict": lambda rows: ((), {"batch": {"x": ROWS[rows]}}),
    "tuple": lambda rows: (((ROWS[rows],),), {}),
    "lengths": lambda rows: ((ROWS[rows], [LENGTHS[i] for i in rows]), {}),
    "options": lambda rows: ((ROWS[rows],), {"options": {"kind": [1, "a"]}}),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_time_first_however_the_batch_is_handed_over(call):
    model = adapted(TimeFirst(), task_type=None, target_modules=["first", "inner"])
    args, kwargs = call([0, 1, 2])
    mixed = model(*args, **kwargs, adapter_names=NAMES)
    assert {layer.rows_name: layer.rows for layer in layers_of(model)} == {"first": "batch", "inner": "time"}
    for row, name in enumerate(NAMES):
        same = model(*args, **kwargs, adapter_names=[name] * 3)
        torch.testing.assert_close(mixed[row], same[row])  # one task for all rows, wherever they are
        args_alone, kwargs_alone = call([row])
        fresh = adapted(TimeFirst(), task_type=None, target_modules=["first", "inner"])  # has learned nothing yet
        alone = fresh(*args_alone, **kwargs_alone, adapter_names=[name])
        torch.testing.assert_close(mixed[row : row + 1], alone)
    with pytest.raises(ValueError, match="adapter_names has 2 entries .* 3 rows"):
        model(*args, **kwargs, adapter_names=NAMES[:2])


def padded_encoder() -> nn.TransformerEncoder:
    torch.manual_seed(1)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 2)


def test_a_padded_batch_in_an_encoder_of_torch():
    """In evaluation torch makes nested tensors of it, which no linear layer of an adapter can take."""
    base = padded_encoder().eval()
    padding = torch.arange(3)[None] >= torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        wanted = base(ROWS, src_key_padding_mask=padding)
    model = adapted(base, task_type=None, target_modules=["linear1", "linear2"])
    with torch.no_grad():
        mixed = model(ROWS, src_key_padding_mask=padding, adapter_names=NAMES)
        for row, (name, length) in enumerate(zip(NAMES, LENGTHS, strict=True)):
            alone = model(ROWS[row : row + 1, :length], adapter_names=[name])
            torch.testing.assert_close(mixed[row : row + 1, :length], alone)
    torch.testing.assert_close(mixed[2, :2], wanted[2, :2])
    plain = model.unload()
    assert plain.use_nested_tensor
    with torch.no_grad():
        assert torch.equal(plain(ROWS, src_key_padding_mask=padding), wanted)


def test_all_linear_leaves_an_attention_of_torch_alone_where_the_model_could_not_be_tried():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    base = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**sizes, num_patches=16, patch_size=4))
    with pytest.warns(UserWarning, match=r"without calling them.*head\.attention\.out_proj"):
        model = adapted(base, task_type=None)
    names = {layer.rows_name for layer in layers_of(model)}
    assert "head.mlp.fc1" in names and "head.attention.out_proj" not in names
