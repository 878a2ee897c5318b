"""scripts/quantise: the types that were asked for, what they lose, where their importance is from, and nothing overwritten."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import importance
import numpy as np
import pytest
import quant_mix
import quantise

import cacheroute
from cacheroute import Llama
from cacheroute.model import gguf_file
from cacheroute.model.checks import EXPERT_TENSOR
from support import tiny_models
from support.decoding import decoded

SHAPE: dict[str, Any] = {"n_embd": 256, "n_ff": 256, "n_head": 4, "head_dim": 64, "n_expert": 4, "n_used": 2}
HELDOUT = Path(cacheroute.__file__).parent / "data" / "heldout.txt"
# From most to least bits; of two layers the second gets more bits where a mix has layers with more.
EXPERTS = {
    "Q8_0": {"q8_0": 6},
    "Q6_K": {"q6_K": 6},
    "Q5_K_M": {"q5_K": 5, "q6_K": 1},
    "Q4_K_M": {"q4_K": 5, "q6_K": 1},
    "Q4_0": {"q4_0": 6},
    "IQ4_XS": {"iq4_xs": 6},
    "Q3_K_M": {"q3_K": 4, "q4_K": 2},
    "Q2_K": {"q2_K": 4, "q3_K": 2},
    "IQ2_XS": {"iq2_xs": 6},
}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, quantise.__file__, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one sentence of wrong usage."""
    assert quantise.main([*map(str, arguments)]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert said.out == ""
    return line


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.write("qwen3moe", tmp_path_factory.mktemp("source") / "tiny-F16.gguf", **SHAPE)


@pytest.fixture(scope="module")
def copies(source: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("copies") / "new"
    done = run(source, "--types", ",".join(EXPERTS).lower(), "--out-dir", folder, "-f", prose, "--tokens", 512)
    assert done.returncode == 0, done.stderr
    return folder, done


def types(path: Path) -> Counter[str]:
    return Counter(t.type for t in gguf_file.read(path).tensors if EXPERT_TENSOR.match(t.name))


def test_experts_have_the_types_that_were_asked_for(copies: tuple[Path, subprocess.CompletedProcess[str]], source: Path) -> None:
    folder, done = copies
    assert {p.name for p in folder.iterdir()} == {f"tiny-{kind}.gguf" for kind in EXPERTS}
    assert {kind: types(folder / f"tiny-{kind}.gguf") for kind in EXPERTS} == EXPERTS
    facts = quant_mix.Facts(2, 4, 2)
    for mix in ("Q4_K_M", "IQ4_XS", "Q6_K", "Q8_0"):  # the rules that scripts/make_shape_model.py writes its files by
        for t in gguf_file.read(folder / f"tiny-{mix}.gguf").tensors:
            if len(t.shape) > 1 and "ffn_gate_inp" not in t.name:
                assert t.type.upper() == quant_mix.tensor_type(mix, t.name, t.shape[0], facts), (mix, t.name)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()]
    assert [row[0] for row in rows[2:]] == [source.name, *(f"tiny-{kind}.gguf" for kind in EXPERTS)]
    assert rows[3][3:5] == ["8.50", "Q8_0 6"] and rows[-1][3:5] == ["2.31", "IQ2_XS 6"]


def test_only_experts_may_have_fewer_bits(source: Path, tmp_path: Path) -> None:
    done = run(source, "--types", "q2_k", "--out-dir", tmp_path, "--no-importance", "--experts-only")
    assert done.returncode == 0, done.stderr
    header = gguf_file.read(tmp_path / "tiny-Q2_K.gguf")
    assert types(tmp_path / "tiny-Q2_K.gguf") == EXPERTS["Q2_K"]
    others = [t for t in header.tensors if len(t.shape) > 1 and not EXPERT_TENSOR.match(t.name) and "ffn_gate_inp" not in t.name]
    assert {t.type for t in others} == {"q8_0"} and {"token_embd.weight", "output.weight"} <= {t.name for t in others}


def test_fewer_bits_lose_more_and_every_copy_decodes(copies: tuple[Path, subprocess.CompletedProcess[str]], source: Path) -> None:
    def log_probabilities(path: Path) -> Any:
        llm = Llama(str(path), budget="50%", n_ctx=64, n_threads=1, verbose=False)
        rows = np.array(decoded(llm))
        llm.close()
        return rows

    truth = log_probabilities(source)
    kl = {}
    for kind in EXPERTS:
        found = log_probabilities(copies[0] / f"tiny-{kind}.gguf")
        kl[kind] = float((np.exp(truth) * (truth - found)).sum(1).mean())
    order = ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"]
    assert 0 < kl["Q8_0"] < 0.01, kl
    assert [kl[kind] for kind in order] == sorted(kl[kind] for kind in order), kl
    assert kl["Q5_K_M"] < kl["IQ4_XS"] < kl["Q3_K_M"] and kl["Q2_K"] < kl["IQ2_XS"], kl


def test_importance_is_the_mean_square_of_what_comes_in(source: Path, prose: Path) -> None:
    text = prose.read_text()
    found = importance.collect(source, [("prose", text)], 512, 2)
    assert (found.n_chunks, found.texts) == (1, "prose")
    llm = Llama(str(source), budget="50%", n_ctx=64, n_threads=1, verbose=False)
    tokens = llm.tokenize(text.encode(), add_bos=False)[:512]
    tokens[0] = llm.token_bos()
    llm.close()
    tensors = {t.name: np.asarray(t.data, np.float32) for t in gguf.GGUFReader(source).tensors}
    x = tensors["token_embd.weight"][tokens]
    x = x / np.sqrt((x**2).mean(1, keepdims=True) + 1e-5) * tensors["blk.0.attn_norm.weight"]
    np.testing.assert_allclose(found.means("blk.0.attn_q.weight")[0], (x**2).mean(0), rtol=1e-3)
    # What experts were given together is what the router was given, each token as often as it chose experts.
    for layer in range(2):
        gate, router = f"blk.{layer}.ffn_gate_exps.weight", f"blk.{layer}.ffn_gate_inp.weight"
        assert found.counts[gate].sum() == 2 * found.counts[router].sum() == 1024
        np.testing.assert_allclose(found.sums[gate].sum(0), 2 * found.sums[router][0], rtol=1e-5)
        down = f"blk.{layer}.ffn_down_exps.weight"
        assert found.counts[down].tolist() == found.counts[gate].tolist() and found.means(down).shape == (4, 256)
    assert found.experts[1] == 8


def test_an_expert_that_no_token_chose_counts_all_inputs_alike() -> None:
    name = "blk.0.ffn_down_exps.weight"
    found = importance.Importance("t", 1, {name: np.array([[6.0, 3.0], [0.0, 0.0]])}, {name: np.array([3, 0])})
    assert found.means(name).tolist() == [[2.0, 1.0], [1.0, 1.0]]
    assert found.experts == (1, 2)


def test_the_file_says_where_its_importance_is_from(copies: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    keys = gguf_file.read(copies[0] / "tiny-Q4_0.gguf").metadata
    assert (keys["quantize.imatrix.dataset"], keys["quantize.imatrix.chunks_count"]) == ("t.txt", 1)
    assert "importance matrix: 512 tokens; " in copies[1].stderr


def test_a_quantised_source_is_copied_with_a_warning(
    copies: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--types", "q4_0", "--out-dir", str(tmp_path), "--no-importance"]
    assert quantise.main([str(copies[0] / "tiny-Q8_0.gguf"), *options]) == 0
    said = "warning: 16 of 18 matrices of tiny-Q8_0.gguf are quantised already (q8_0), and what they have lost stays lost"
    assert capsys.readouterr().err.splitlines()[0] == said
    assert "warning" not in copies[1].stderr
    assert types(tmp_path / "tiny-Q4_0.gguf") == {"q4_0": 6}


def test_what_exists_is_not_overwritten_and_nothing_else_is_written(source: Path, prose: Path, tmp_path: Path) -> None:
    mine = tmp_path / "tiny-Q4_0.gguf"
    mine.write_text("mine")
    done = run(source, "--types", "q8_0,q4_0", "--out-dir", tmp_path, "-f", prose)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"quantise: {mine} exists; move it away, or leave out its type.\n"
    assert [p.name for p in tmp_path.iterdir()] == [mine.name] and mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--types", "q8_0,q9_x"], "There is no type 'q9_x'; there are q8_0, q6_k, "),
        (["--types", ","], "--types names no type; there are q8_0, "),
        (["--types", "iq2_xs", "--no-importance"], "iq2_xs needs an importance matrix; leave out --no-importance or the type."),
        (["--types", "q8_0", "--no-importance", "-f", "t"], "--no-importance has no use for a text; leave out either it or -f."),
        (["--types", "q8_0", "--tokens", "0"], "--tokens and --threads are 1 or more."),
        (["--types", "q8_0", "--wheel", "w.whl"], "--wheel builds the demo model; leave out either it or "),
        (
            ["--types", "q8_0", "-f", str(HELDOUT)],
            "heldout.txt is the held-out text that models are judged on; give another text.",
        ),
        (["--types", "q6_k", "-f", __file__ + "x"], f"{__file__}x cannot be read (No such file or directory)."),
    ],
)
def test_wrong_usage_is_one_sentence(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: Sequence[str], said: str
) -> None:
    assert refused(capsys, source, *options, "--out-dir", tmp_path).startswith(f"quantise: {said}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [["--types", "q6_k", "--no-importance"], ["--types", "q4_0", "--tokens", "100000"]])
def test_ctrl_c_leaves_nothing_behind(source: Path, tmp_path: Path, options: Sequence[str]) -> None:
    """While a copy is written, and while the importance matrix is computed."""
    command = [sys.executable, quantise.__file__, str(source), "--out-dir", str(tmp_path), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        if "--tokens" in options:
            process.stderr.readline()
        else:
            while process.poll() is None and not list(tmp_path.glob(".quantise-*/*")):
                time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "quantise: Stopped.\n")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence(source: Path, tmp_path: Path) -> None:
    """As a limit on the size of files is: what is written fails."""
    limited = 'ulimit -f 1000; exec "$@"'
    command = [sys.executable, quantise.__file__, str(source), "--types", "q8_0", "--out-dir", str(tmp_path)]
    done = subprocess.run(["bash", "-c", limited, "-", *command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "") and list(tmp_path.iterdir()) == []
    assert "Traceback" not in done.stderr
    said = f"quantise: Q8_0 of {source} cannot be made: the file cannot be written, and its disk has "
    assert done.stderr.splitlines()[-1].startswith(said)


def test_rows_of_the_demo_model_that_no_k_quant_fits(demo_model: Path) -> None:
    assert quantise.narrow(gguf_file.read(demo_model)) == {32: ["ffn_down_exps"], 576: ["attn_output"]}
