"""`python -m bench verify-quant`: adapters over bases that other libraries quantise, each right or refused by name.

A small llama is quantised each way. The truth beside it is a plain model whose weights are what the quantised layers
multiply by, read out with an identity; what a library adds of its own, as int8 activations, is measured without
adapters, and adapters may not be further off than twice that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from .report.readme import markdown
from .report.rows import ROOT, origin
from .run import conclude

PAGE, BLOCK = ROOT / "docs" / "quantised.md", "verify-quant"
LAYERS = ("q_proj", "v_proj", "down_proj")  # adapted ones
SLACK, ROUNDING = 2.0, 1e-5  # times the library's own error; of float32
TOLD = 5.0  # times what is allowed: less than adapters change
TASKS = ["math", "code"]
RIGHT = "right"
LIBRARIES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "hqq": "hqq", "quanto": "optimum-quanto"}


@dataclass(frozen=True)
class Verdict:
    """What came of one way to quantise: "right", "refused by name (why)", or what is wrong."""

    way: str
    forward: str
    training: str
    merge: str
    reload: str

    @property
    def fine(self) -> bool:
        return all(
            cell == RIGHT or cell.startswith("refused by name")
            for cell in (self.forward, self.training, self.merge, self.reload)
        )


def plain(folder: Path) -> Any:
    """The model before it is quantised."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def by_config(config: Any) -> Callable[[Path], Any]:
    """A way by transformers."""

    def load(folder: Path) -> Any:
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM.from_pretrained(
            folder, dtype=torch.float32, device_map="cpu", quantization_config=config
        )

    return load


def in_place(change: Callable[[Any], object]) -> Callable[[Path], Any]:
    """A way by the library itself, given the decoder."""

    def load(folder: Path) -> Any:
        model = plain(folder)
        change(model.model)
        return model

    return load


def with_hqq(decoder: nn.Module) -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for parent in list(decoder.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                settings = BaseQuantizeConfig(nbits=4, group_size=64)
                made = HQQLinear(layer, settings, compute_dtype=torch.float32, device="cpu", del_orig=False)
                setattr(parent, name, made)


def ways() -> dict[str, Callable[[], Callable[[Path], Any]]]:
    """Library and form -> its loader; calling it imports the library."""

    def four_bit() -> Callable[[Path], Any]:
        from transformers import BitsAndBytesConfig

        form = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
        return by_config(BitsAndBytesConfig(load_in_4bit=True, **form))

    def eight_bit() -> Callable[[Path], Any]:
        from transformers import BitsAndBytesConfig

        return by_config(BitsAndBytesConfig(load_in_8bit=True))

    def ao_by_config() -> Callable[[Path], Any]:
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return by_config(TorchAoConfig(Int8WeightOnlyConfig()))

    def ao_in_place() -> Callable[[Path], Any]:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        return in_place(lambda decoder: quantize_(decoder, Int8WeightOnlyConfig()))

    def hqq() -> Callable[[Path], Any]:
        import hqq.core.quantize  # noqa: F401

        return in_place(with_hqq)

    def quanto_by_config() -> Callable[[Path], Any]:
        import optimum.quanto  # noqa: F401
        from transformers import QuantoConfig

        return by_config(QuantoConfig(weights="int8"))

    def quanto_in_place() -> Callable[[Path], Any]:
        from optimum.quanto import freeze, qint8, quantize

        return in_place(lambda decoder: (quantize(decoder, weights=qint8), freeze(decoder)))

    return {
        "bitsandbytes nf4": four_bit,
        "bitsandbytes int8": eight_bit,
        "torchao int8, TorchAoConfig": ao_by_config,
        "torchao int8, quantize_()": ao_in_place,
        "hqq 4 bits": hqq,
        "quanto int8, QuantoConfig": quanto_by_config,
        "quanto int8, quantize()": quanto_in_place,
    }


def adapted(base: Any) -> Any:
    """Two tasks on it, B drawn too."""
    from peft import get_peft_model

    from alora_kernels.tuner import ALoRAConfig

    torch.manual_seed(1)
    config = ALoRAConfig(task_type="CAUSAL_LM", tasks=TASKS, r=4, target_modules=list(LAYERS))
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.manual_seed(len(name))
            parameter.data.normal_(std=0.2)
    return model.eval()


@torch.no_grad()
def truth_of(model: Any, folder: Path) -> Any:
    """The plain model with the weights that the quantised layers multiply by."""
    made, layers = plain(folder), dict(model.named_modules())
    for name, layer in made.named_modules():
        if isinstance(layer, nn.Linear):
            layer.weight.copy_(layers[name](torch.eye(layer.in_features)).T)
    return made


def off(got: Tensor, truth: Tensor) -> float:
    """Relative to the truth."""
    return float((got - truth).norm() / truth.norm())


def run_of(model: Any, ids: Tensor, names: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of a mixed batch, and the gradients of adapters."""
    model.zero_grad()
    logits = model(input_ids=ids, adapter_names=names).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def merged(model: Any, ids: Tensor) -> str:
    """One task merged: nearer to the task than half of what the task changes, or refused."""
    from alora_kernels.tuner import set_task

    with torch.no_grad():
        base = model(input_ids=ids, adapter_names=["__base__"] * len(ids)).logits
        set_task(model, TASKS[0])
        wanted = model(input_ids=ids).logits
        try:
            got = model.merge_and_unload()(input_ids=ids).logits
        except ValueError as error:
            kept = torch.equal(model(input_ids=ids).logits, wanted)
            return f"refused by name ({error})" if kept else "changed, then refused"
    return RIGHT if 2 * off(got, wanted) < off(base, wanted) else f"off by {off(got, wanted):.2g}"


def reloaded(model: Any, folder: Path, ids: Tensor, names: list[str]) -> str:
    """Saved, and loaded over the base in bfloat16, which another loading by hand agrees with."""
    from peft import PeftModel

    with TemporaryDirectory() as place:
        model.save_pretrained(place)
        loaded = PeftModel.from_pretrained(plain(folder).to(torch.bfloat16), place).eval()
    own = {name: p for name, p in model.named_parameters() if "asymlora" in name}
    theirs = {name: p for name, p in loaded.named_parameters() if "asymlora" in name}
    if own.keys() != theirs.keys() or not all(torch.equal(own[name].cpu(), theirs[name]) for name in own):
        return "other adapters than were saved"
    other = adapted(plain(folder).to(torch.bfloat16))
    for name, parameter in other.named_parameters():
        if name in own:
            parameter.data.copy_(own[name])
    with torch.no_grad():
        same = [m(input_ids=ids, adapter_names=names).logits for m in (loaded, other)]
    return RIGHT if torch.equal(*same) else "other logits than by hand"


def verdict(way: str, load: Callable[[Path], Any], folder: Path) -> Verdict:
    """One way through all four."""
    ids = torch.randint(1, 128, (4, 12), generator=torch.Generator().manual_seed(0))
    names = ["math", "code", "__base__", "code"]
    base = load(folder).eval()
    beside = truth_of(base, folder)
    with torch.no_grad():
        own = off(base(input_ids=ids).logits, beside(input_ids=ids).logits)
    allowed = SLACK * own + ROUNDING
    model, exact = adapted(base), adapted(beside)
    (logits, grads), (wanted, wanted_grads) = (run_of(m, ids, names) for m in (model, exact))
    forward = off(logits, wanted)
    with torch.no_grad():
        effect = off(exact(input_ids=ids, adapter_names=["__base__"] * len(names)).logits, wanted)
    if effect < TOLD * allowed:
        raise ValueError(f"{way}: adapters change the logits by {effect:.2g} only, of which {allowed:.2g} is allowed")
    if grads.keys() != wanted_grads.keys() or not grads:
        training = "gradients are missing"
    else:
        worst = max(off(grads[name], wanted_grads[name]) for name in grads)
        training = RIGHT if worst <= 4 * allowed else f"gradients off by {worst:.2g}"
    return Verdict(
        way,
        RIGHT if forward <= allowed else f"off by {forward:.2g}",
        training,
        reload=reloaded(model, folder, ids, names),
        merge=merged(model, ids),
    )


def main(
    page: Annotated[Path, typer.Option(help=f"its block {BLOCK} is rewritten")] = PAGE,
) -> None:
    """Forward, training, merging and reloading over quantised bases of four libraries (about a minute)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from alora_kernels.recipes.display import quiet

    quiet()
    verdicts, missing = [], []
    with TemporaryDirectory(prefix="verify-quant-") as name:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
        LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=128)).save_pretrained(name)
        for way, prepare in ways().items():
            try:
                load = prepare()
            except ImportError:
                missing.append(way)
            else:
                verdicts.append(verdict(way, load, Path(name)))
    run = origin("cpu", "transformers", "peft")
    libraries = ", ".join(filter(None, map(_version, LIBRARIES.values())))
    rows = [[cell.partition(" (")[0] for cell in (v.way, v.forward, v.training, v.merge, v.reload)] for v in verdicts]
    reasons = dict.fromkeys(v.merge.partition(" (")[2][:-1] for v in verdicts if " (" in v.merge)
    versions = f"torch {run['torch']}, transformers {run['transformers']}, peft {run['peft']}"
    facts = f"float32 on {run['device']}; {libraries}; {versions}; commit {run['commit']}, {run['date']}."
    table = markdown(["base", "forward", "training", "merge", "reload over bfloat16"], [], rows)
    refusals = "Refusals: " + "; ".join(f'"{reason}"' for reason in reasons) + "."
    text = "\n\n".join([facts, "\n".join(table), *([refusals] if reasons else [])])
    if missing:
        typer.echo(f"not installed: {', '.join(missing)}")
    conclude(page, BLOCK, text, right=all(v.fine for v in verdicts), whole=not missing)


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""
