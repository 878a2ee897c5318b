"""`setup` in environments of pip, uv and pipx; what it says before it compiles; and that it replaces no other engine.

A wheel of three small files plays the engine; nothing is compiled or downloaded.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import cacheroute
from cacheroute.errors import CacherouteError, UsageError
from cacheroute.install import engine_build, engine_source, tools
from cacheroute.install.engine_build import BuildOptions
from support import programs
from support.cli import cacheroute as run
from support.environments import of_python, with_cacheroute

ROOT = Path(cacheroute.__file__).parent.parent


def wheel(folder: Path, version: str, key: str = "") -> Path:
    """A llama-cpp-python that does nothing; with a key, one of ours."""
    folder.mkdir(exist_ok=True)
    path = folder / f"llama_cpp_python-{version}-py3-none-any.whl"
    info = f"llama_cpp_python-{version}.dist-info"
    content = {
        "llama_cpp/__init__.py": f'__version__ = "{version}"\n',
        **({"llama_cpp/cacheroute_engine.json": json.dumps({"key": key})} if key else {}),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    content[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in (*content, f"{info}/RECORD"))
    with zipfile.ZipFile(path, "w") as file:
        for name, text in content.items():
            file.writestr(name, text)
    return path


def of_uv(folder: Path) -> Path:
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
    return folder / "bin" / "python"


@pytest.mark.parametrize("make", [of_python, of_uv])
def test_an_environment_without_pip_gets_the_engine(make: Callable[[Path], Path], tmp_path: Path) -> None:
    python = with_cacheroute(make(tmp_path / "venv"))
    ours = wheel(tmp_path / "wheels", engine_build.LOCAL_VERSION, "k" * 20)
    code = (
        "import importlib.util, sys; from pathlib import Path; from cacheroute.install import engine_build as e\n"
        "assert importlib.util.find_spec('pip') is None\n"
        "e.install(Path(sys.argv[1])); print(e.installed_state().kind, e.installed_key())\n"
        "assert importlib.util.find_spec('pip') is None, 'nothing else is installed for it'"
    )
    done = subprocess.run([python, "-c", code, ours], capture_output=True, text=True, check=False)
    assert done.stdout == f"patched {'k' * 20}\n", done.stderr


def test_where_pip_is_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundled = tmp_path / "ensurepip" / "_bundled"
    bundled.mkdir(parents=True)
    specs: dict[str, object] = {"pip": True, "ensurepip": SimpleNamespace(origin=str(tmp_path / "ensurepip" / "__init__.py"))}
    programs: dict[str, str] = {}
    monkeypatch.setattr(importlib.util, "find_spec", specs.get)
    monkeypatch.setattr(shutil, "which", programs.get)
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: None)
    monkeypatch.delenv("UV", raising=False)
    assert tools.pip()[:3] == [sys.executable, "-m", "pip"]
    specs["pip"] = None
    with pytest.raises(CacherouteError, match="has no pip, and neither ensurepip nor uv"):
        tools.pip()
    programs["pip3"] = "/usr/bin/pip3"
    assert tools.pip()[:3] == ["/usr/bin/pip3", "--python", sys.executable]
    programs["uv"] = "/usr/bin/uv"
    assert tools.pip()[:6] == ["/usr/bin/uv", "tool", "run", "pip", "--python", sys.executable]
    (bundled / "pip-24.0-py3-none-any.whl").touch()
    assert tools.pip()[:2] == [sys.executable, str(bundled / "pip-24.0-py3-none-any.whl" / "pip")]
    debian = tmp_path / "python-wheels"
    specs["ensurepip"] = None
    debian.mkdir()
    (debian / "pip-23.0-py3-none-any.whl").touch()
    monkeypatch.setattr("sysconfig.get_config_var", lambda name: str(debian) if name == "WHEEL_PKG_DIR" else None)
    assert tools.pip()[1] == str(debian / "pip-23.0-py3-none-any.whl" / "pip")


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages with somebody else's llama-cpp-python, which is all that can be imported."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel(tmp_path / "wheels", engine_source.VERSION)) as file:
        file.extractall(site)
    monkeypatch.setattr(sys, "path", [str(site)])
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    return site


def test_another_engine_is_not_replaced_unasked(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[Path] = []
    monkeypatch.setattr(engine_build, "recipe", lambda portable=False: {"portable": portable})
    monkeypatch.setattr(engine_build, "build", lambda options, progress: Path("our.whl"))
    monkeypatch.setattr(engine_build, "install", lambda path, progress: installed.append(path))
    for ask in (engine_build.ensure, engine_build.to_compile):
        with pytest.raises(UsageError, match=rf"llama-cpp-python {engine_source.VERSION} is installed here.*setup --replace"):
            ask(BuildOptions())
    assert installed == []
    engine_build.ensure(BuildOptions(replace=True))
    assert installed == [Path("our.whl")]
    shutil.rmtree(next(other.glob("*.dist-info")))  # copied there by hand
    importlib.invalidate_caches()
    with pytest.raises(UsageError, match="no llama-cpp-python has installed"):
        engine_build.ensure(BuildOptions())
    shutil.rmtree(other / "llama_cpp")
    importlib.invalidate_caches()
    engine_build.ensure(BuildOptions())
    assert len(installed) == 2


def test_the_command_refuses_before_it_builds(tmp_path: Path) -> None:
    """With another engine before ours on the path, as a person has it."""
    with zipfile.ZipFile(wheel(tmp_path / "wheels", "0.3.1")) as file:
        file.extractall(tmp_path / "site")
    done = run("setup", "--no-demo", env={"PYTHONPATH": str(tmp_path / "site"), "CACHEROUTE_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "llama-cpp-python 0.3.1 is installed here" in done.stderr
    assert not (tmp_path / "cache").exists()


def test_what_will_be_compiled_is_said(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_build, "recipe", lambda portable=False: {"portable": portable})
    monkeypatch.setattr(engine_build, "installed_key", lambda: None)
    monkeypatch.setattr(engine_build, "available_memory", lambda **_: 100 << 30)
    monkeypatch.setattr(engine_build, "cores", lambda: 4)
    said = engine_build.to_compile(BuildOptions(replace=True))
    assert said and "about 3 with 4 compilers at a time (--jobs)" in said
    said = engine_build.to_compile(BuildOptions(replace=True, jobs=1))
    assert said and "about 9 with 1 compiler at a time" in said
    monkeypatch.setattr(engine_build, "available_memory", lambda **_: 2 * engine_build._JOB_BYTES + 1)
    assert engine_build._jobs(BuildOptions()) == 2 and engine_build._jobs(BuildOptions(jobs=8)) == 8
    monkeypatch.setattr(engine_build, "available_memory", lambda **_: 1)
    assert engine_build._jobs(BuildOptions()) == 1
    monkeypatch.setattr(engine_build, "available_memory", lambda **_: None)
    assert engine_build._jobs(BuildOptions()) == 4
    kept = own_cache / "engine" / engine_build.key_of({"portable": False})
    kept.mkdir(parents=True)
    (kept / "engine.whl").touch()
    assert engine_build.to_compile(BuildOptions(replace=True)) is None, "it is in the cache"
    assert engine_build.to_compile(BuildOptions(replace=True, portable=True)) is not None


@pytest.mark.parametrize(
    ("typed", "extra", "options"),
    [
        ([], ".", ""),
        (["dev"], ".[dev]", ""),
        (["--wheel", "a b.whl"], ".", "--wheel,a b.whl"),
        (["dev", "--jobs", "1"], ".[dev]", "--jobs,1"),
        (["serve", "plot"], ".[serve,plot]", ""),
    ],
)
def test_the_script_takes_an_extra_and_options_of_setup(typed: list[str], extra: str, options: str, tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/setup", "pyproject.toml", "models.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("patches", "cacheroute/native"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    packages = tmp_path / ".venv/lib/python3/site-packages"
    (packages / "numpy.dist-info").mkdir(parents=True)
    for name in ("python", "cacheroute"):
        programs.write(tmp_path / ".venv/bin" / name, f'IFS=,\necho "$*" >{name}.arguments\n')

    def set_up() -> str:
        """What Python was asked for last."""
        subprocess.run([tmp_path / "scripts/setup", *typed], check=True, timeout=60)
        assert (tmp_path / "cacheroute.arguments").read_text().strip() == ",".join(["setup", *([options] if options else [])])
        return (tmp_path / "python.arguments").read_text().strip()

    assert set_up().endswith(f",{extra}")
    assert set_up() == "-m,pip,--version", "all is there"
    (packages / "of_another_extra.dist-info").mkdir()
    assert set_up() == "-m,pip,--version", "and more"
    (tmp_path / "cacheroute/native/hook.h").write_text("")
    assert set_up().endswith(f",{extra}")
    (packages / "numpy.dist-info").rename(packages / "other.dist-info")
    assert set_up().endswith(f",{extra}")


def test_the_script_refuses_an_extra_that_does_not_exist() -> None:
    done = subprocess.run([ROOT / "scripts/setup", "serve,plots"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "") and "there is no extra plots; there are dask eval " in done.stderr
