"""Whether `--budget auto` stays within a limit of memory that it shares with a program that takes more and more of it.

`python scripts/memory_trials.py model.gguf --trials 50` runs `cacheroute generate` and a hog in one control group, whose limit
is drawn between what the model needs at least and what would hold all of it. The hog begins after 0 to 6 seconds, takes up to
nine tenths of what the budget can give back, holds it for two seconds and frees it. The same trials under `ulimit -v`
(--ulimit) have no hog: the limit is of one process. Printed: how many runs were killed, failed, were refused with a sentence,
had their budget made smaller, or gave another text than a run without a limit.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from cacheroute.bench.memory_limit import MemoryLimit
from cacheroute.errors import CacherouteError
from cacheroute.files import GIB, MIB
from cacheroute.model import experts, gguf_file, memory_plan

_PYTHON = 160 * MIB  # of the interpreter and its libraries, and another one for the hog and this program
_HOG = """
import mmap, sys, time
size, delay, rate = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
time.sleep(delay)
memory, step, at = mmap.mmap(-1, max(size, 1)), 4 << 20, 0
while at < size:
    part = min(step, size - at)
    memory[at:at + part] = b"x" * part
    at += part
    time.sleep(part / rate)
time.sleep(2)
memory.close()
time.sleep(60)
"""


def command(model: str, n: int) -> list[str]:
    engine = ["--raw", "-p", "a b c d e f g h", "-n", str(n), "-c", "512", "--temp", "0", "--io", "direct", "-o", "json"]
    return [sys.executable, "-m", "cacheroute", "generate", "-m", model, *engine]


def inside(trial: dict[str, float | str]) -> int:
    """In the group: the hog and the model; a line of JSON about what came of it."""
    sys.stdin.readline()
    hog = subprocess.Popen([sys.executable, "-c", _HOG, str(trial["hog"]), str(trial["delay"]), str(trial["rate"])])
    done = subprocess.run(command(str(trial["model"]), int(trial["n"])), capture_output=True, text=True, stdin=subprocess.DEVNULL)
    hog_code = hog.poll()
    hog.kill()
    print(json.dumps({"code": done.returncode, "out": done.stdout, "err": done.stderr, "hog": hog_code}))
    return 0


def limited(model: str, n: int, nbytes: int) -> dict[str, object]:
    """Under `ulimit -v`."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (nbytes, nbytes))

    done = subprocess.run(command(model, n), capture_output=True, text=True, stdin=subprocess.DEVNULL, preexec_fn=limit)
    return {"code": done.returncode, "out": done.stdout, "err": done.stderr, "hog": None}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-n", type=int, default=60)
    parser.add_argument("--ulimit", action="store_true")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.inside:
        return inside(json.loads(a.inside))
    if not a.model:
        parser.error("name a model")
    header = gguf_file.read(a.model)
    layout = experts.layout(header)
    reference = json.loads(
        subprocess.run([*command(a.model, a.n), "--budget", "50%"], capture_output=True, text=True, check=True).stdout
    )["text"]
    draw, came = random.Random(a.seed), Counter[str]()
    mapped = header.nbytes if a.ulimit else 0  # address space of the file's mapping
    for i in range(a.trials):
        whole = memory_plan.of(header, layout, n_ctx=512, free=64 * GIB)
        least, most = whole.needed(layout.n_used), whole.needed(layout.n_expert - 1)
        free = int(draw.uniform(0.9 * least, 1.05 * most))
        plan = memory_plan.of(header, layout, n_ctx=512, free=free)
        given = ((plan.capacity or layout.n_used) - layout.n_used) * layout.resident_bytes
        trial = {
            "model": a.model,
            "n": a.n,
            "hog": int(0.9 * draw.random() * given),
            "delay": 6 * draw.random(),
            "rate": 200 * MIB,
        }
        limit = free + 3 * _PYTHON + mapped
        start = time.monotonic()
        try:
            if a.ulimit:
                got = limited(a.model, a.n, limit + GIB)
            else:
                with MemoryLimit(limit).process([sys.executable, __file__, "--inside", json.dumps(trial)]) as child:
                    out, _ = child.communicate("\n")
                got = json.loads(out) if out else {"code": -9, "out": "", "err": "the group was killed", "hog": None}
        except CacherouteError as e:
            print(f"memory_trials: {e}", file=sys.stderr)
            return 1
        kinds = [kind(got, reference)]
        kinds += ["made smaller"] * ("memory is short" in str(got["err"])) + ["grew again"] * ("memory again" in str(got["err"]))
        kinds += ["hog killed"] * (got["hog"] not in (None, 0))
        came.update(kinds)
        first = str(got["err"]).strip().splitlines()[:1]
        taken = f"hog {int(trial['hog']) / MIB:.0f} MiB after {trial['delay']:.1f} s"
        line = f"{i}: {limit / MIB:.0f} MiB, {taken}: {', '.join(kinds)}, {time.monotonic() - start:.0f} s"
        print(line, *first, sep="; ", file=sys.stderr, flush=True)
    print(", ".join(f"{n} {name}" for name, n in came.most_common()))
    return 0


def kind(got: dict[str, object], reference: str) -> str:
    code = got["code"]
    if code == 0:
        return "ran" if json.loads(str(got["out"]))["text"] == reference else "ran, with another text"
    if code == 2:
        return "refused"
    return "killed" if code in (-9, 137) else f"failed with {code}"


if __name__ == "__main__":
    sys.exit(main())
