"""`bench verify-quant` on the one library that is always installed, and on bases that are wrong on purpose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from bench import verify_quant as quant


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 128}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).save_pretrained(place)
    return place


def test_four_bits_are_right(folder: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="quantised bases need bitsandbytes")
    found = quant.verdict("nf4", quant.ways()["bitsandbytes nf4"](), folder)
    assert found == quant.Verdict("nf4", *[quant.RIGHT] * 4) and found.fine


class Stops(nn.Linear):
    """Lets nothing through but the numbers: layers before it get no gradient."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.detach())


def test_lost_gradients_are_found(folder: Path) -> None:
    def load(place: Path) -> Any:
        model = quant.plain(place)
        model.model.layers[0].mlp.up_proj.__class__ = Stops
        model.model.layers[0].mlp.gate_proj.__class__ = Stops
        return model

    found = quant.verdict("stops", load, folder)
    assert found.forward == quant.RIGHT and "gradients off" in found.training and not found.fine


def test_a_base_that_changes_under_adapters_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(place: Path) -> Any:
        model = quant.plain(place)
        adapt = quant.adapted

        def spoilt(base: Any) -> Any:
            if base is model:
                base.model.layers[0].self_attn.v_proj.weight.data.mul_(1.5)
            return adapt(base)

        monkeypatch.setattr(quant, "adapted", spoilt)
        return model

    assert "off by" in quant.verdict("spoilt", load, folder).forward
