"""`cacheroute pull`: a model of the catalogue or of the hub, into the hub's cache."""

from __future__ import annotations

from typing import Annotated

import typer

from cacheroute.model import pull as puller


def pull(
    name: Annotated[
        str, typer.Argument(metavar="NAME|hf:OWNER/REPO[:FILE]", help="A name of `cacheroute models`, or a GGUF on the hub.")
    ],
) -> None:
    """Fetch a model. Its path goes to stdout; what was fetched stays if you stop it, and the same command goes on.

    FILE is a file name, a glob, or a quantisation such as Q4_K_M. HF_ENDPOINT (a mirror), HF_TOKEN and HF_HUB_CACHE count.
    """
    try:
        path = puller.pull(name)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Stopped; run the same command to go on.") from None
    print(path)
