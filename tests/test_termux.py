"""scripts/termux in folders that look like a phone's, with programs that only write down how they were called."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import cacheroute
from support import programs

ROOT = Path(cacheroute.__file__).parent.parent
LOGS = 'echo "$(basename "$0") $*" >>{root}/log\n'
PYTHON = """\
case "$*" in
  *venv*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; cp {root}/cacheroute .venv/bin/cacheroute ;;
  "-c import"*|"-c from importlib.metadata import version"*) echo pydantic-core==2.46.4 ;;
  "-c "*) echo "filelock>=3.10" ;;
esac
"""


@pytest.fixture
def phone(tmp_path: Path) -> Path:
    """Termux's folders, and a checkout of no more than the script and pyproject.toml."""
    bins = tmp_path / "com.termux" / "files" / "usr" / "bin"
    checkout = tmp_path / "home" / "cacheroute"
    for folder in (bins, checkout / "scripts"):
        folder.mkdir(parents=True)
    for name in ("scripts/termux", "pyproject.toml"):
        (checkout / name).write_text((ROOT / name).read_text())
    logs = LOGS.format(root=tmp_path)
    for name in ("pkg", "termux-wake-lock", "termux-wake-unlock"):
        programs.write(bins / name, logs)
    programs.write(bins / "python", logs + PYTHON.format(root=tmp_path))
    programs.write(bins / "dpkg", f'grep -qx "$2" {tmp_path}/packages 2>/dev/null\n')
    programs.write(bins / "uname", "echo aarch64\n")
    programs.write(tmp_path / "cacheroute", logs)
    (bins / "sh").symlink_to("/bin/sh")
    return tmp_path


def bins(phone: Path) -> Path:
    return phone / "com.termux" / "files" / "usr" / "bin"


def script(phone: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    usual = {"PREFIX": str(bins(phone).parent), "HOME": str(phone / "home"), "PATH": f"{bins(phone)}:/usr/bin:/bin"}
    call = ["bash", str(phone / "home" / "cacheroute" / "scripts" / "termux"), *words]
    return subprocess.run(call, env=usual | env, capture_output=True, text=True, check=False)


def log(phone: Path) -> list[str]:
    return [line.strip() for line in (phone / "log").read_text().splitlines()] if (phone / "log").exists() else []


def test_what_it_would_do(phone: Path) -> None:
    done = script(phone, "--dry-run", "serve", "plot", "pull")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and log(phone) == [] and not (phone / "home/cacheroute/.venv").exists(), done.stderr
    assert lines[0] == "termux-wake-lock" and lines[-1] == "termux-wake-unlock"
    assert lines[1] == (
        "pkg install -y python python-pip python-ensurepip-wheels python-numpy clang cmake ninja git "
        "python-pydantic-core matplotlib"
    )
    assert lines[2] == "python -m venv --system-site-packages .venv"
    deps, own, serve, hub, rest, setup, *launchers, _ = lines[3:]
    assert all(name in deps for name in ("scikit-build-core", "gguf>=", "typer>=")) and "no-build-isolation" not in deps
    assert own.endswith("--no-build-isolation --no-deps --editable .")
    assert "pydantic-core pydantic starlette uvicorn" in serve and "--no-deps huggingface_hub" in hub and "without hf-xet" in rest
    assert setup == ".venv/bin/cacheroute setup"
    assert [line.rpartition("/")[2] for line in launchers] == ["cacheroute", "cr"]
    assert all(len(line) <= 45 for line in done.stderr.splitlines()), done.stderr


def test_it_does_it(phone: Path) -> None:
    done = script(phone, "serve", "pull")
    lines = log(phone)
    assert done.returncode == 0 and done.stderr.splitlines()[-1] == "Done. Try: cr doctor", done.stderr
    assert lines[0] == "termux-wake-lock" and lines[-1] == "termux-wake-unlock" and "cacheroute setup" in lines
    assert any("pydantic-core==2.46.4 pydantic starlette" in line for line in lines), "the one that is here"
    assert any(line.endswith("install --quiet filelock>=3.10") for line in lines)
    subprocess.run([bins(phone) / "cr", "generate", "-p", "two words"], check=True, env={"PATH": "/usr/bin:/bin"})
    assert log(phone)[-1] == "cacheroute generate -p two words"


def test_it_goes_on_after_a_kill(phone: Path) -> None:
    (phone / "packages").write_text("python\npython-pip\nclang\n")
    programs.write(phone / "cacheroute", "kill -9 $$\n")
    done = script(phone)
    assert done.returncode == 137
    lines = log(phone)
    assert lines[1] == "pkg install -y python-ensurepip-wheels python-numpy cmake ninja git", "only what is missing"
    assert lines[0] == "termux-wake-lock" and lines[-1] == "termux-wake-unlock"
    assert not (bins(phone) / "cr").exists()
    programs.write(phone / "home/cacheroute/.venv/bin/cacheroute", LOGS.format(root=phone))
    (phone / "log").unlink()
    again = script(phone)
    assert again.returncode == 0 and "cacheroute setup" in log(phone)
    assert not any("-m venv" in line for line in log(phone)), "the environment is kept"


def test_what_others_have_put_in_its_place_stays(phone: Path) -> None:
    programs.write(bins(phone) / "cr", "echo chart-releaser\n")
    done = script(phone)
    assert done.returncode == 0 and "cr is another program; it stays." in done.stderr
    assert "chart-releaser" in (bins(phone) / "cr").read_text() and (bins(phone) / "cacheroute").exists()
    assert script(phone).returncode == 0, "its own are written again"


def test_without_a_wake_lock_it_says_so(phone: Path) -> None:
    (bins(phone) / "termux-wake-lock").unlink()
    assert "keep the screen on" in script(phone, "--dry-run").stderr


def test_a_dry_run_works_anywhere(phone: Path) -> None:
    programs.write(bins(phone) / "uname", "echo armv8l\n")
    done = script(phone, "--dry-run", PREFIX="")
    assert done.returncode == 0 and log(phone) == [], done.stderr
    assert "elsewhere run scripts/setup" in done.stderr and "this is armv8l" in done.stderr
    assert "write /data/data/com.termux/files/usr/bin/cr" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("env", "words", "machine", "code", "said"),
    [
        ({"PREFIX": "/usr"}, [], "aarch64", 1, "elsewhere run scripts/setup"),
        ({}, ["--fast"], "aarch64", 2, "--fast is none of"),
        ({}, [], "armv8l", 1, "needs a 64-bit system; this is armv8l"),
    ],
)
def test_what_it_refuses(env: dict[str, str], words: list[str], machine: str, code: int, said: str, phone: Path) -> None:
    programs.write(bins(phone) / "uname", f"echo {machine}\n")
    done = script(phone, *words, **env)
    assert done.returncode == code and said in done.stderr and done.stderr.count("\n") == 1 and log(phone) == []


def test_shared_storage_is_refused(phone: Path) -> None:
    """By a pwd that says so: no test can make a folder there."""
    (phone / "env").write_text("pwd() { echo /storage/emulated/0/cacheroute; }\nexport -f pwd\n")
    done = script(phone, BASH_ENV=str(phone / "env"))
    assert done.returncode == 1 and "move this folder to ~" in done.stderr and log(phone) == []
