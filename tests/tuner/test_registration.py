"""The type in PEFT's tables: an ordinary enum member, registered once, in whichever order things are imported."""

from __future__ import annotations

import copy
import enum
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftType, get_peft_model, peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from alora_kernels.tuner import ALoRAConfig, ALoRAModel
from alora_kernels.tuner.register import extend_str_enum, register

from ..support.tiny import adapted, llama, tokens


def test_tables():
    member = PeftType.ASYMLORA
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is ALoRAConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING["ASYMLORA"] is ALoRAModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == ALoRAModel.prefix == "asymlora_"


def test_registering_again_changes_nothing():
    before = list(PeftType)
    register(ALoRAConfig, ALoRAModel)
    assert list(PeftType) == before
    with pytest.raises(RuntimeError, match=r"knows ASYMLORA already.*import only one"):
        register(type("Other", (ALoRAConfig,), {}), ALoRAModel)


class Colour(str, enum.Enum):  # noqa: UP042 - PeftType's own bases
    RED = "RED"
    BLUE = "BLUE"


@pytest.mark.parametrize("cls", [PeftType, Colour])
def test_the_member_is_like_those_of_the_class_body(cls):
    name = "ASYMLORA"
    member = extend_str_enum(cls, name)
    assert extend_str_enum(cls, name) is member
    assert isinstance(member, cls)
    assert cls(name) is cls[name] is getattr(cls, name) is member
    assert (member.name, member.value, str.__str__(member)) == (name, name, name)
    assert member == name
    assert hash(member) == hash(name)
    assert member in cls
    assert list(cls)[-1] is member
    assert list(cls.__members__)[-1] == name
    assert len(cls) == len(list(cls))
    assert repr(member) == f"<{cls.__name__}.{name}: '{name}'>"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member
    assert copy.copy(member) is copy.deepcopy(member) is member
    assert json.dumps({"t": member}) == f'{{"t": "{name}"}}'
    with pytest.raises(AttributeError):
        setattr(cls, name, 1)
    with pytest.raises(ValueError, match="is not a valid"):
        cls("NO_SUCH")


def _python(code: str, *args: object) -> str:
    command, environment = [sys.executable, "-c", code, *map(str, args)], {**os.environ, "PYTHONHASHSEED": "0"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def test_a_config_unpickled_in_a_new_process(tmp_path):
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(ALoRAConfig(tasks=["a"], target_modules=["q"])))
    out = _python(f"import pickle; print(pickle.load(open({str(tmp_path / 'config.pkl')!r}, 'rb')).tasks)")
    assert out == "['a']"


def test_other_types_get_their_names_from_peft():
    """With a tensor of ids stock LoRA fails as it does without us; ours takes it."""
    stock = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    ours, ids = adapted(), torch.tensor([0, 1])
    search = peft_model.get_alora_offsets_for_forward
    with pytest.raises(RuntimeError, match="Boolean value of Tensor"):
        search.__wrapped__(stock, tokens(), adapter_names=ids)
    with pytest.raises(RuntimeError, match="Boolean value of Tensor"):
        search(stock, tokens(), adapter_names=ids)
    assert search(ours, tokens(), adapter_names=ids)["adapter_names"] is ids


def test_the_import_changes_no_function_of_peft():
    """Of its modules and classes every name means what it meant; only the tables have one entry more."""
    out = _python(
        "import sys, peft, transformers.integrations.peft, safetensors.torch\n"
        "def names():\n"
        "    own = [m for n, m in sorted(sys.modules.items()) if n.partition('.')[0] in ('peft', 'safetensors')]\n"
        "    own += [transformers.integrations.peft, transformers.integrations.peft.PeftAdapterMixin]\n"
        "    own += [c for m in own for c in vars(m).values() if isinstance(c, type) and c.__module__[:4] == 'peft']\n"
        "    return {(id(o), n): v for o in own for n, v in vars(o).items()}\n"
        "before = names(); import alora_kernels.tuner; after = names()\n"
        "print(sorted({n for (_, n), v in before.items() if after.get((_, n)) is not v}), len(before) > 5000)\n"
        "print(set(n for _, n in after) - set(n for _, n in before))"
    )
    assert out.splitlines() == ["[] True", "{'ASYMLORA'}"]


OTHERS = """
import hashlib, pathlib, sys, torch, peft
from collections import OrderedDict
if sys.argv[2] == "with":
    import alora_kernels.tuner as ours
def base():
    torch.manual_seed(1)
    return torch.nn.Sequential(OrderedDict(up=torch.nn.Linear(8, 16), act=torch.nn.Tanh(), down=torch.nn.Linear(16, 4)))
if sys.argv[2] == "with":  # PEFT is adjusted when the first model is made
    peft.get_peft_model(base(), ours.ALoRAConfig(tasks=2, target_modules=["up"])).save_pretrained(sys.argv[1] + "/ours")
both = {"target_modules": ["up", "down"]}
for config in (peft.LoraConfig(**both, init_lora_weights=False), peft.LoraConfig(**both, use_dora=True),
               peft.IA3Config(**both, feedforward_modules=["down"]), peft.LoHaConfig(**both), peft.VeraConfig(**both)):
    name = type(config).__name__ + str(getattr(config, "use_dora", ""))
    model, folder = peft.get_peft_model(base(), config), pathlib.Path(sys.argv[1], name)
    print(name, *peft.get_peft_model_state_dict(model), *model.state_dict())
    model.save_pretrained(folder)
    for file in sorted(folder.iterdir()):
        print(file.name, hashlib.sha256(file.read_bytes()).hexdigest())
    again = peft.PeftModel.from_pretrained(base(), folder)
    print(again.load_adapter(folder, "other"), *again.state_dict())
    print(hashlib.sha256(again(torch.ones(2, 8)).detach().numpy().tobytes()).hexdigest())
"""


def test_adapters_of_other_types_are_the_same_with_and_without_us(tmp_path):
    said = [_python(OTHERS, tmp_path / us, us) for us in ("with", "without")]
    assert said[0] == said[1]
    assert said[0].count("adapter_model.safetensors") == 5


HIDE_FINDER = (
    "find = importlib.machinery.PathFinder.find_spec;"
    "importlib.machinery.PathFinder.find_spec = "
    "classmethod(lambda c, n, *a: None if n == 'peft' else find(n, *a))"
)
#: what a new process does -> what it prints
PROCESSES = {
    "PEFT imported before": (
        "import peft; from alora_kernels._peft_hook import register_with_peft as r; r();"
        "print(peft.PeftType('ASYMLORA').name)",
        "ASYMLORA",
    ),
    "a failing registration does not break the import of PEFT": (
        "import sys, warnings; from alora_kernels import _peft_hook; _peft_hook.ADAPTER = 'no.such.module';"
        "_peft_hook.register_with_peft(); warnings.simplefilter('ignore');\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always'); import peft\n"
        "print(any('could not register' in str(w.message) for w in seen), peft.__name__)",
        "True peft",
    ),
    "looking for PEFT first, and asking again, loses no registration": (
        "import copy, importlib, importlib.metadata, importlib.util as u, pathlib, sys, threading, alora_kernels\n"
        "from alora_kernels._peft_hook import register_with_peft as r; r(); r()\n"
        "from transformers.utils import is_peft_available\n"
        "assert is_peft_available() and importlib.metadata.version('peft') and importlib.metadata.files('peft')\n"
        "spec = [u.find_spec('peft') for _ in range(3)][-1]; copy.deepcopy(spec)\n"
        "assert spec.loader.is_package('peft') and pathlib.Path(spec.loader.get_filename('peft')).exists()\n"
        "assert 'peft' not in sys.modules\n"
        "threads = [threading.Thread(target=importlib.import_module, args=('peft',)) for _ in range(4)]\n"
        "[x.start() for x in threads]; [x.join() for x in threads]\n"
        "import peft; print(peft.PeftType.ASYMLORA.value, 'ASYMLORA' in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING)\n"
        "assert not any(type(f).__name__ == '_AfterImport' for f in sys.meta_path); r()\n"
        "assert 'Register' not in type(peft.__spec__.loader).__name__\n"
        "importlib.reload(peft); print(peft.PeftType.ASYMLORA.value)",
        "ASYMLORA True ASYMLORA",
    ),
    "an import that fails first is registered when it succeeds": (
        "import sys; import alora_kernels\n"
        "sys.modules['accelerate'] = None\n"  # PEFT cannot be imported without it
        "try:\n    import peft\nexcept ImportError:\n    print('no')\n"
        "del sys.modules['accelerate']\n"
        "[sys.modules.pop(n) for n in list(sys.modules) if n.partition('.')[0] == 'peft']\n"
        "import peft; print(peft.PeftType.ASYMLORA.value)",
        "no ASYMLORA",
    ),
    "PEFT that is blocked": (
        "import sys\nsys.modules['peft'] = None\nimport alora_kernels\n"
        "try:\n    import peft\nexcept ModuleNotFoundError as error:\n    print(error.name)",
        "peft",
    ),
    "PEFT that is not installed": (
        f"import sys, importlib.util, importlib.machinery\n{HIDE_FINDER}\nimport alora_kernels\n"
        "try:\n    import peft\nexcept ModuleNotFoundError as error:\n    print(error.name)\n"
        "print(importlib.util.find_spec('peft'))",
        "peft None",
    ),
    # the one who comes second waits: there is no moment at which the type is neither registered nor awaited
    "a thread that imports PEFT meanwhile": (
        "import sys, threading, importlib, time\n"
        "peft = threading.Thread(target=importlib.import_module, args=('peft',)); peft.start()\n"
        "while 'peft' not in sys.modules and peft.is_alive(): time.sleep(0.001)\n"
        "import alora_kernels; peft.join()\n"
        "print(sys.modules['peft'].PeftType.ASYMLORA.value)",
        "ASYMLORA",
    ),
}


@pytest.mark.parametrize(("code", "printed"), PROCESSES.values(), ids=PROCESSES.keys())
def test_in_whichever_order_things_are_imported(code, printed):
    assert _python(code).split() == printed.split()
