"""The type in PEFT's tables: an ordinary enum member, registered once, in whichever order things are imported."""

from __future__ import annotations

import copy
import enum
import json
import pickle
import subprocess
import sys

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from alora_kernels.integrations.peft import ALoRAConfig, ALoRAModel
from alora_kernels.integrations.peft.register import extend_str_enum, register


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


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_peft_imported_later_and_a_config_unpickled_in_a_new_process(tmp_path):
    config = ALoRAConfig(tasks=["a"], target_modules=["q"])
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(config))
    out = _python(
        "import sys; from alora_kernels.integrations.lazy import register_with_peft as r; r(); r();"
        "assert 'peft' not in sys.modules; import peft; print(peft.PeftType.ASYMLORA.value);"
        "assert not any(type(f).__name__ == '_AfterImport' for f in sys.meta_path); r();"
        "assert 'Register' not in type(peft.__spec__.loader).__name__;"
        f"import pickle; print(pickle.load(open({str(tmp_path / 'config.pkl')!r}, 'rb')).tasks)"
    )
    assert out.splitlines() == ["ASYMLORA", "['a']"]


def test_peft_imported_before():
    assert _python(
        "import peft; from alora_kernels.integrations.lazy import register_with_peft as r; r();"
        "print(peft.PeftType('ASYMLORA').name)"
    ) == "ASYMLORA"  # fmt: skip


def test_a_failing_registration_does_not_break_the_import_of_peft():
    out = _python(
        "import sys, warnings; from alora_kernels.integrations import lazy; lazy.ADAPTER = 'no.such.module';"
        "lazy.register_with_peft(); warnings.simplefilter('ignore');\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always'); import peft\n"
        "print(any('could not register' in str(w.message) for w in seen), peft.__name__)"
    )
    assert out == "True peft"
