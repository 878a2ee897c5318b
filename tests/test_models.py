"""The catalogue's form, and what a name of a model means on this disk."""

from __future__ import annotations

import importlib
import json
import os
import re
from pathlib import Path

import gguf
import pytest

from cacheroute.errors import CacherouteError, UsageError
from cacheroute.model import catalogue, demo_model, memory_plan
from cacheroute.model.catalogue import ModelEntry
from support import tiny_models

command = importlib.import_module("cacheroute.cli.models")  # the package's attribute of this name is the function
CATALOGUE = catalogue.load_catalogue()
GIB = 1024**3


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, with no model in it."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.setenv("CACHEROUTE_CACHE", str(home / "cacheroute"))
    for name in ("HF_HUB_CACHE", "OLLAMA_MODELS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(home)
    return home


# ---- the catalogue ----


def test_the_demo_is_first_and_the_papers_four_follow() -> None:
    assert list(CATALOGUE)[:5] == ["demo", "qwen1.5-moe-a2.7b", "deepseek-v2-lite", "phi-3.5-moe", "mixtral-8x7b"]


@pytest.mark.parametrize("entry", CATALOGUE.values(), ids=CATALOGUE)
def test_form_of_an_entry(entry: ModelEntry) -> None:
    counts = (entry.nbytes, entry.experts, entry.used, entry.layers, entry.n_embd, entry.n_ff, entry.j, entry.least)
    assert all(type(n) is int and n > 0 for n in counts)
    assert all(type(n) is int and n > 0 for n in entry.expert_types.values())
    assert type(entry.unloaded) is int and entry.unloaded >= 0 and entry.shared >= 0
    assert entry.name == entry.name.lower() and entry.title and entry.quantisation and entry.licence
    assert entry.used <= entry.experts
    assert entry.least == entry.used
    assert entry.j == (1 if entry.used == 2 else 2)
    assert 0 <= entry.lambda_ <= 1
    assert re.fullmatch(r"\d+%", entry.budget) and entry.used <= entry.experts * int(entry.budget[:-1]) // 100
    assert set(entry.source) == {"file", "shape", "types", "lambda", "licence"} and all(entry.source.values())
    assert sum(entry.expert_types.values()) == 3 * entry.layers  # gate, up and down of each layer
    assert entry.name == "demo" or re.fullmatch(r"[\w.-]+/[\w.-]+", entry.repository)
    assert entry.file.endswith(".gguf")
    for kind in entry.expert_types:  # a row of the matrix is whole blocks
        assert entry.n_embd % catalogue.BLOCKS[kind][0] == 0 or entry.n_ff % catalogue.BLOCKS[kind][0] == 0
    # experts are most of such a file, and not all of it
    assert 0.02 < entry.dense_bytes / entry.nbytes < (0.85 if entry.name == "demo" else 0.2)


def test_block_sizes_are_those_of_ggml() -> None:
    for kind, size in catalogue.BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]] == size


@pytest.mark.parametrize(
    ("name", "megabytes"), [("phi-3.5-moe", 47.62), ("mixtral-8x7b", 106.66), ("qwen3-30b-a3b", 2.86), ("gpt-oss-20b", 13.22)]
)
def test_derived_expert_sizes_agree_with_headers_that_others_read(name: str, megabytes: float) -> None:
    entry = CATALOGUE[name]
    assert entry.expert_bytes / entry.layers / 1e6 == pytest.approx(megabytes, abs=0.005)


def test_the_demo_entry_is_the_demo_model() -> None:
    entry = CATALOGUE["demo"]
    shape = (entry.experts, entry.used, entry.layers, entry.n_embd, entry.n_ff)
    assert shape == (demo_model.EXPERTS, demo_model.CHOSEN, demo_model.LAYERS, demo_model.WIDTH, demo_model.EXPERT_SIZE)
    assert entry.shared == demo_model.SHARED / demo_model.EXPERT_SIZE
    assert entry.nbytes == demo_model.pinned()[1]
    assert catalogue.demo_path() == demo_model.default_path()


# ---- names ----


def put(path: Path, content: bytes = b"GGUF") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def in_hub(home: Path, repository: str, name: str, revision: str = "c0", main: bool = True, content: bytes = b"GGUF") -> Path:
    """A file in the hub's cache as huggingface_hub lays it out."""
    repo = home / "hf" / "hub" / f"models--{repository.replace('/', '--')}"
    blob = put(repo / "blobs" / f"{revision}-{name.replace('/', '-')}", content)
    path = repo / "snapshots" / revision / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(blob, path.parent))
    if main:
        put(repo / "refs" / "main", revision.encode())
    return path


def in_ollama(root: Path, registry: str, owner: str, name: str, tag: str, content: bytes = b"GGUF") -> Path:
    digest = f"{hash((registry, owner, name, tag)) & (2**64 - 1):064x}"
    blob = put(root / "blobs" / f"sha256-{digest}", content)
    layers = [
        {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"},
        {"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:0"},
    ]
    put(root / "manifests" / registry / owner / name / tag, json.dumps({"layers": layers}).encode())
    return blob


def test_no_name_and_demo_both_mean_the_demo_model(home: Path) -> None:
    for name in (None, "demo", "DEMO"):
        with pytest.raises(CacherouteError, match=r"run `cacheroute setup`"):
            catalogue.resolve(name)
    path = put(home / "cacheroute" / "models" / "cacheroute-demo.gguf")
    assert catalogue.resolve(None) == catalogue.resolve("demo") == path


def test_a_path_resolves_to_itself_and_a_known_name_comes_before_a_file(home: Path) -> None:
    path = put(home / "some.gguf")
    assert catalogue.resolve(str(path)) == path
    assert catalogue.resolve("some.gguf") == Path("some.gguf")
    assert catalogue.resolve("~/some.gguf") == path
    put(home / "qwen3-30b-a3b")
    with pytest.raises(CacherouteError, match=r"run `cacheroute pull qwen3-30b-a3b`"):
        catalogue.resolve("qwen3-30b-a3b")
    assert catalogue.resolve("./qwen3-30b-a3b") == Path("qwen3-30b-a3b")


def test_a_pulled_model_is_found_by_its_name(home: Path) -> None:
    entry = CATALOGUE["olmoe-1b-7b"]
    old = in_hub(home, entry.repository, entry.file, "c0")
    assert catalogue.resolve("olmoe-1b-7b") == old
    new = in_hub(home, entry.repository, entry.file, "c1")
    in_hub(home, entry.repository, entry.file, "c2", main=False)
    assert catalogue.resolve("OLMoE-1B-7B") == new  # what main points to
    new.resolve().unlink()
    assert catalogue.resolve("olmoe-1b-7b") != new  # a dangling link is no model


def test_a_split_model_counts_only_when_complete(home: Path) -> None:
    repository = CATALOGUE["glm-4.5-air"].repository
    first = in_hub(home, repository, "Q4_K_M/GLM-4.5-Air-Q4_K_M-00001-of-00002.gguf")
    with pytest.raises(CacherouteError, match=r"pull glm-4\.5-air"):
        catalogue.resolve("glm-4.5-air")
    in_hub(home, repository, "Q4_K_M/GLM-4.5-Air-Q4_K_M-00002-of-00002.gguf")
    assert catalogue.resolve("glm-4.5-air") == first
    assert catalogue.resolve(f"hf:{repository}:Q4_K_M") == first
    assert [m.nbytes for m in catalogue.hub_models()] == [8]


def test_hub_names(home: Path) -> None:
    q4, q8 = (in_hub(home, "me/some-GGUF", f"some-{q}.gguf") for q in ("Q4_K_M", "Q8_0"))
    in_hub(home, "me/some-GGUF", "mmproj-F16.gguf")
    assert catalogue.resolve("hf:me/some-GGUF:some-Q4_K_M.gguf") == q4
    assert catalogue.resolve("hf:me/some-GGUF:q8_0") == q8
    with pytest.raises(UsageError, match=r"some-Q4_K_M\.gguf, hf:me/some-GGUF:some-Q8_0\.gguf"):
        catalogue.resolve("hf:me/some-GGUF")
    with pytest.raises(CacherouteError, match="cacheroute pull hf:me/other"):
        catalogue.resolve("hf:me/other")
    with pytest.raises(UsageError, match="no hub name"):
        catalogue.resolve("hf:me")


def test_ollama_names(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = home / "ollama"
    monkeypatch.setenv("OLLAMA_MODELS", str(root))
    latest = in_ollama(root, "registry.example", "library", "qwen3", "latest")
    sized = in_ollama(root, "registry.example", "library", "qwen3", "30b-a3b")
    mine = in_ollama(root, "registry.example", "me", "moe", "q4")
    other = in_ollama(root, "hub.example", "me", "moe", "q4")
    put(root / "manifests" / "registry.example" / "library" / "broken" / "latest", b"{")
    assert catalogue.resolve("ollama:qwen3") == latest
    assert catalogue.resolve("ollama:qwen3:30b-a3b") == sized
    assert catalogue.resolve("ollama:me/moe:q4") == mine
    assert catalogue.resolve("ollama:hub.example/me/moe:q4") == other
    with pytest.raises(UsageError, match="write the whole name"):
        catalogue.resolve("ollama:moe")
    with pytest.raises(UsageError, match="There is no ollama:broken; this store has ollama:"):
        catalogue.resolve("ollama:broken")


def test_lmstudio_names(home: Path) -> None:
    new = put(home / ".lmstudio" / "models" / "maker" / "Some-GGUF" / "Some-Q4_K_M.gguf")
    old = put(home / ".cache" / "lm-studio" / "models" / "maker" / "Other-GGUF" / "Other-Q8_0.gguf")
    put(home / ".lmstudio" / "models" / "maker" / "Some-GGUF" / "mmproj-Some.gguf")
    assert catalogue.resolve("lmstudio:maker/Some-GGUF/Some-Q4_K_M.gguf") == new
    assert catalogue.resolve("lmstudio:other") == old
    with pytest.raises(UsageError, match="may be lmstudio:"):
        catalogue.resolve("lmstudio:maker")


def test_an_unknown_name_lists_close_ones() -> None:
    for wrong in ("qwen3-30b", "qwen3-30b-a3"):
        with pytest.raises(UsageError, match="did you mean qwen3-30b-a3b"):
            catalogue.resolve(wrong)
    with pytest.raises(UsageError, match="`cacheroute models` lists the names"):
        catalogue.resolve("zzzzzz")
    with pytest.raises(UsageError, match=r"There is no file no/such\.gguf"):
        catalogue.resolve("no/such.gguf")


def test_what_a_pattern_means() -> None:
    names = [
        "a-Q4_K_M.gguf",
        "a-Q4_K.gguf",
        "d/b-Q8_0-00002-of-00002.gguf",
        "d/b-Q8_0-00001-of-00002.gguf",
        "mmproj-a.gguf",
        "x.txt",
    ]
    first = "d/b-Q8_0-00001-of-00002.gguf"
    assert catalogue.first_shards(names) == ["a-Q4_K.gguf", "a-Q4_K_M.gguf", first]
    assert catalogue.match_files("Q4_K", names) == ["a-Q4_K.gguf"]
    assert catalogue.match_files("q4_k_m", names) == ["a-Q4_K_M.gguf"]
    assert catalogue.match_files("b-*.gguf", names) == catalogue.match_files("d/*-of-00002.gguf", names) == [first]
    assert catalogue.match_files("d/b-Q8_0-00002-of-00002.gguf", names) == [first]
    assert catalogue.match_files("nothing", names) == []
    assert catalogue.shards(first, names) == [first, "d/b-Q8_0-00002-of-00002.gguf"]


# ---- the command ----


def test_models_lists_the_catalogue_and_the_disk(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = tiny_models.write("qwen3moe", tmp_path / "tiny.gguf").read_bytes()
    in_hub(home, "me/tiny-GGUF", "tiny-F16.gguf", content=tiny)
    in_ollama(home / ".ollama" / "models", "r", "library", "dense", "latest")  # no whole GGUF: left out
    monkeypatch.setattr(command, "available_memory", lambda **_: 4 * GIB)
    monkeypatch.setattr(command, "free_disk", lambda _: 20 * 1000**3)
    command.models("json")
    out, err = capsys.readouterr()
    assert "1 more on this disk" in err
    listed = json.loads(out)
    assert listed["memory_available"] == 4 * GIB
    rows = {m["name"]: m for m in listed["models"]}
    assert list(rows)[:-1] == list(CATALOGUE)
    mine = rows["hf:me/tiny-GGUF:tiny-F16.gguf"]
    assert (mine["experts"], mine["used"], mine["fits"], mine["suggested_budget"]) == (32, 4, "yes", "all")
    assert mine["quantisation"] == "F16"
    assert mine["nbytes"] == len(tiny) and Path(mine["path"]).read_bytes() == tiny
    qwen = rows["qwen3-30b-a3b"]
    plan = memory_plan.of_entry(CATALOGUE["qwen3-30b-a3b"], n_ctx=4096, free=4 * GIB)
    assert plan.capacity and plan.n_used <= plan.capacity < 64 and int(qwen["suggested_budget"]) == plan.capacity
    assert qwen["path"] is None and qwen["fits"] == "yes"
    assert rows["phi-3.5-moe"]["fits"] == "needs 23.6 GiB of disk"
    assert rows["granite-3.1-3b-a800m"]["suggested_budget"] == "all"

    command.models("text")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(rows) + 1 and lines[0].split() == ["NAME", "GiB", "HERE", "E/K", "FITS", "BUDGET"]
    end = lines[0].index("GiB") + 3
    assert all(line[end - 1] != " " and line[end : end + 2] == "  " for line in lines)  # aligned


def test_a_model_that_does_not_fit_reports_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "available_memory", lambda **_: GIB)
    monkeypatch.setattr(command, "free_disk", lambda _: 100 * GIB)
    command.models("json")
    mixtral = next(m for m in json.loads(capsys.readouterr().out)["models"] if m["name"] == "mixtral-8x7b")
    assert (mixtral["fits"], mixtral["suggested_budget"]) == ("needs 9.1 GiB of memory", None)


def test_an_unknown_output_lists_what_there_is() -> None:
    with pytest.raises(UsageError, match="text and json"):
        command.models("xml")


def test_what_fits_goes_by_the_header_where_the_model_is_here(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = tiny_models.write("qwen3moe", tmp_path / "tiny.gguf").read_bytes()
    entry = CATALOGUE["olmoe-1b-7b"]
    path = in_hub(home, entry.repository, entry.file, content=tiny)
    assert command._fit(entry, path, GIB) == ("yes", "all")
    assert command._fit(entry, None, GIB)[0].startswith("needs ")
    assert command._fit(entry, put(home / "cut.gguf"), 64 * GIB) == ("yes", "all")  # by the catalogue
    monkeypatch.setattr(memory_plan, "available_memory", lambda **_: None)
    assert command._fit(entry, path, None) == ("?", None)
