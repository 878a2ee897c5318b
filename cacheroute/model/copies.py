"""Several quantisations of one model: checked to have one shape and one tokenizer, and named by what their file names differ in.

Reads headers only. That two files of one shape were trained alike cannot be read from them: the KL between them tells it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cacheroute.errors import UsageError
from cacheroute.model import experts, gguf_file
from cacheroute.model.experts import ExpertLayout
from cacheroute.model.gguf_file import GgufFile

_TOKENIZER = ("model", "pre", "bos_token_id", "add_bos_token", "add_space_prefix")  # scalars that change how a text is cut
_SAME_FUNCTION = ("context_length",)  # keys of an architecture that change nothing of a short text
_OPTIONAL = re.compile(r"^(output\.weight|rope_.*)$")  # tensors that some converters leave out where others write them
_SEPARATORS = "-. "  # a type has _ within itself


@dataclass(frozen=True)
class Copy:
    """One file of a model: `name` is short, for tables."""

    name: str
    path: Path
    header: GgufFile
    layout: ExpertLayout
    fingerprint: str


def read(paths: Sequence[Path]) -> tuple[Copy, ...]:
    """The files of one model, in the order given.

    Raises UsageError naming the first thing that two of them differ in other than their types, and for a file given twice.
    """
    headers = [gguf_file.read(path) for path in paths]
    prints = [gguf_file.content_fingerprint(path) for path in paths]
    for i, found in enumerate(prints):
        if found in prints[:i]:
            raise UsageError(f"{paths[i]} and {paths[prints.index(found)]} are the same file; name each one once.")
    layouts = [experts.layout(header) for header in headers]
    for path, header in zip(paths[1:], headers[1:], strict=True):
        different = next(differences(headers[0], header), None)
        if different:
            raise UsageError(f"{path} is no copy of the model in {paths[0]}: {different}; give quantisations of one model.")
    parts = zip(names(paths), paths, headers, layouts, prints, strict=True)
    return tuple(Copy(*part) for part in parts)


def differences(a: GgufFile, b: GgufFile) -> Iterator[str]:
    """What keeps two files from being quantisations of one model, in words. Keys that only one of them has are no difference."""
    if a.architecture != b.architecture:
        yield f"its architecture is {b.architecture}, not {a.architecture}"
        return
    own, tokenizer = f"{a.architecture}.", "tokenizer.ggml."
    keys = [k for k in a.metadata if k.startswith(own) and k.removeprefix(own) not in _SAME_FUNCTION]
    for key in (*keys, *(tokenizer + k for k in _TOKENIZER)):
        ours, others = a.metadata.get(key), b.metadata.get(key)
        if ours is not None and others is not None and ours != others:
            yield f"its {key} is {others}, not {ours}"
    for key, values in a.lists.items():
        if key.startswith(own) and b.lists.get(key, values) != values:
            yield f"its {key} are other numbers"
    for key, digest in a.texts.items():
        if key.startswith(tokenizer) and b.texts.get(key, digest) != digest:
            yield f"its tokenizer is another one ({key} differs)"
    shapes, others_shapes = ({t.name: t.shape for t in header.tensors if len(t.shape) > 1} for header in (a, b))
    for name in sorted(shapes.keys() | others_shapes.keys()):
        if name in shapes and name in others_shapes:
            if shapes[name] != others_shapes[name]:
                yield f"its tensor {name} is {_shape(others_shapes[name])}, not {_shape(shapes[name])}"
        elif not _OPTIONAL.match(name):
            yield f"its tensor {name} is {'new' if name in others_shapes else 'missing'}"


def names(paths: Sequence[Path]) -> list[str]:
    """A short name of each file, no two alike: its stem without what all stems begin with; else the stem, else the path.

    The number of a shard is left out.
    """
    stems = [re.sub(r"-\d{5}-of-\d{5}$", "", path.stem) for path in paths]
    if len(set(stems)) < len(stems):
        return [str(path) for path in paths]
    if len(stems) < 2:
        return stems
    same = 0
    for letters in zip(*stems, strict=False):
        if len(set(letters)) > 1:
            break
        same += 1
    cut = max((i + 1 for i in range(same) if stems[0][i] in _SEPARATORS), default=0)
    short = [stem[cut:] for stem in stems]
    return short if all(short) else stems


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
