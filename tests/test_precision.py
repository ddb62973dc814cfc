"""The dtype of a frozen base: what rules bfloat16 out, what a probe decides, what is kept of it, what is refused."""

from __future__ import annotations

import contextlib
import json
import warnings

import pytest
import torch

from alora_kernels import files, precision
from alora_kernels.precision import Choice, explain, resolve

QUICK, SLOW = (0.002, 0.001), (0.001, 0.002)  # seconds in float32 and in bfloat16


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """A cache folder of the test's own, an empty memory, and a CPU that may have bfloat16."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(precision, "_cpu_lacks", lambda: None)
    precision._seconds.cache_clear()
    precision._warn_of_half.cache_clear()
    yield files.cache_dir() / precision.FILE
    precision._seconds.cache_clear()


@pytest.fixture
def probes(monkeypatch):
    """What the probe finds next: (fastest, middle); how often it ran is how many are gone."""
    found = []
    monkeypatch.setattr(precision, "_measure", lambda: found.pop(0))
    return found


@pytest.mark.parametrize(("times", "dtype"), [(QUICK, torch.bfloat16), (SLOW, torch.float32)])
def test_a_cpu_gets_what_the_probe_finds_clearly_faster(probes, times, dtype):
    probes.append((times, times))
    choice = explain("cpu")
    assert choice.dtype == resolve("auto", "cpu") == dtype
    assert f"{1e3 * times[0]:.2f} ms in float32 and {1e3 * times[1]:.2f} in bfloat16" in choice.reason


def test_a_little_faster_is_not_enough(probes):
    probes.append(((1.2e-3, 1e-3), (1.2e-3, 1e-3)))
    assert explain("cpu").name == "float32"


def test_what_was_measured_is_kept_for_the_machine(probes, own_cache):
    probes.append((QUICK, QUICK))
    first = explain("cpu")
    precision._seconds.cache_clear()  # another process
    assert explain("cpu") == first
    (key,) = json.loads(own_cache.read_text())
    assert torch.__version__ in key and str(torch.get_num_threads()) in key


def test_threads_and_settings_are_measured_for_themselves(monkeypatch):
    one, two = precision._key(1), precision._key(2)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert len({one, two, precision._key(1)}) == 3


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", '{"%s": 3}', '{"%s": ["a", 1]}', '{"%s": [0, 1]}', '{"%s": [NaN, 0.1]}', "\x00", "[" * 10**5],
)
def test_a_damaged_cache_is_measured_again_and_replaced(probes, own_cache, text):
    own_cache.parent.mkdir()
    own_cache.write_text(text.replace("%s", precision._key(torch.get_num_threads())))
    probes.append((QUICK, QUICK))
    assert explain("cpu").name == "bfloat16" and not probes
    assert list(json.loads(own_cache.read_text()).values()) == [list(QUICK)]


def test_a_cache_that_cannot_be_written_does_not_hurt(probes, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    probes.append((QUICK, QUICK))
    assert explain("cpu").name == "bfloat16"


def test_without_a_home_folder_nothing_is_kept(probes, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(precision, "cache_dir", homeless)
    probes.append((SLOW, SLOW))
    assert explain("cpu").name == "float32"


def test_neighbours_that_spoil_a_probe_have_it_repeated(probes, own_cache):
    probes += [(QUICK, SLOW), (SLOW, QUICK), (QUICK, QUICK)]
    assert explain("cpu").name == "bfloat16" and not probes
    assert own_cache.exists()


def test_what_stays_unclear_is_decided_by_the_middle_and_not_kept(probes, own_cache):
    probes += [(QUICK, SLOW)] * precision.ATTEMPTS
    assert explain("cpu").name == "float32" and not probes
    assert not own_cache.exists()


def test_the_probe_itself_changes_nothing():
    def state():
        return (
            torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.is_grad_enabled(),
            torch.get_default_dtype(), torch.backends.mkldnn.enabled, torch.is_inference_mode_enabled(),
        )  # fmt: skip

    before, generator = state(), torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        best, middle = precision._measure()
    assert state() == before and torch.equal(torch.get_rng_state(), generator)
    assert all(0 < b <= m < 10 for b, m in zip(best, middle, strict=True))


def test_a_chip_without_bfloat16_is_not_probed(monkeypatch):
    monkeypatch.setattr(precision, "_cpu_lacks", lambda: "this CPU has no bfloat16")
    monkeypatch.setattr(precision, "_measure", lambda: pytest.fail("probed"))
    assert explain("cpu") == Choice(torch.float32, "this CPU has no bfloat16")
    assert explain("cpu", "bfloat16") == Choice(torch.bfloat16, "asked for, though this CPU has no bfloat16")


def test_onednn_switched_off_rules_bfloat16_out(monkeypatch):
    monkeypatch.undo()
    with torch.backends.mkldnn.flags(enabled=False):
        choice = explain("cpu")
    assert choice.name == "float32" and "oneDNN" in choice.reason


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_gets_bfloat16_where_it_has_it(monkeypatch, native):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native and not including_emulation)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    assert resolve("auto", "cuda:1") == (torch.bfloat16 if native else torch.float32)


@pytest.mark.gpu
def test_this_gpu(probes):
    assert explain() == explain("cuda")
    assert explain().dtype == (torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float32)


def test_other_devices_get_float32():
    choice = explain("mps")
    assert choice.dtype == torch.float32 and "mps" in choice.reason


@pytest.mark.parametrize(
    ("wish", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), (torch.float64, torch.float64)]
)
def test_a_wish_is_obeyed(wish, dtype):
    assert explain("cpu", wish) == Choice(dtype, "asked for")


@pytest.mark.parametrize("wish", ["fp32", "", "torch.float32", torch.int32, torch.float8_e4m3fn, None, 16])
def test_what_is_no_dtype_is_refused(wish):
    if wish in ("fp32", "torch.float32"):
        with pytest.raises(ValueError, match="did you mean float32?"):
            resolve(wish, "cpu")
    with pytest.raises(ValueError, match="dtype must be one of auto, float32, bfloat16, float16"):
        resolve(wish, "cpu")


def test_float16_on_a_cpu_warns_once_with_the_figure_and_the_remedy(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: False)
    with pytest.warns(UserWarning, match=r"3\.6 times as long .* Choose bfloat16"):
        assert resolve("float16", "cpu") == torch.float16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve(torch.float16, "cpu")
        resolve(torch.float16, "cuda")
