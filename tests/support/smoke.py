"""What a wheel must do in an environment of its own: `make dist` installs it and runs this in an empty folder."""

import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

import alora_kernels
from alora_kernels.data import load_model

INSTALLED = Path(alora_kernels.__file__).parent


def main() -> None:
    """Fail with the first thing that is missing."""
    assert INSTALLED.is_relative_to(sys.prefix), f"{INSTALLED} is not the wheel's"
    assert metadata.version("alora-kernels") == alora_kernels.__version__
    for file in ("py.typed", "analysis/report.html", "serving/http/page/index.html"):
        assert resources.files("alora_kernels").joinpath(file).is_file(), f"the wheel has no {file}"
    alora = Path(sys.executable).with_name("alora")
    said = subprocess.run([alora, "--version"], capture_output=True, text=True, check=True).stdout
    assert alora_kernels.__version__ in said, said
    subprocess.run([alora, "schema"], stdout=subprocess.DEVNULL, check=True)

    base, tokenizer = load_model("tiny-random")
    config = alora_kernels.ALoRAConfig(r=4, tasks=["a", "b"], target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    batch = tokenizer(["one", "two", "three"], return_tensors="pt", padding=True, padding_side="right")
    names = ["a", "b", "__base__"]
    model(**batch, labels=batch["input_ids"], adapter_names=names).loss.backward()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "asymlora_" in name:
                weight.normal_(std=0.02)
    model.save_pretrained("adapter")
    again = PeftModel.from_pretrained(load_model("tiny-random")[0], "adapter")
    rows = [one.eval()(**batch, adapter_names=names).logits for one in (model, again)]
    assert torch.equal(*rows)
    print(f"alora-kernels {alora_kernels.__version__}: {INSTALLED} imports, routes, trains, saves and loads")


if __name__ == "__main__":
    main()
