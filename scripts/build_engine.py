#!/usr/bin/env python3
"""Builds and installs the patched engine into the Python that runs this; `cacheroute setup` for a
checkout in which cacheroute itself is not installed yet."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cacheroute.errors import CacherouteError
from cacheroute.install import engine_build


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sdist", type=Path, help="use this sdist instead of downloading it")
    parser.add_argument("--portable", action="store_true", help="no CPU flags of this machine: runs on others too")
    parser.add_argument("--check", metavar="VERSION", help="tell whether the patches apply to VERSION; build nothing")
    parser.add_argument("--jobs", type=int, help="compilers at a time (default: one per core)")
    args = parser.parse_args()
    try:
        if args.check:
            results = engine_build.check(args.check, args.sdist)
            for result in results:
                print(result)
            return 0 if all(result.applies for result in results) else 1
        state = engine_build.ensure(engine_build.BuildOptions(args.sdist, args.portable, args.jobs))
        print(f"engine {state.version} is installed", file=sys.stderr)
    except CacherouteError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: nothing half-built was left behind", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
