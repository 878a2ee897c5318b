"""Which passes llama.cpp computes with flash attention: of prompts, by default.

It computes long prompts sooner and takes less memory for them, and decodes more slowly on a CPU (scripts/LOG.md).
"""

from __future__ import annotations

import enum

from cacheroute.errors import UsageError

LEAST = 64
"""Tokens of a pass for which PROMPTS uses it: the tile of llama.cpp's kernel (patches/0009-flash-attention-for-prompts.patch)."""
_F16 = 1  # enum ggml_type


class FlashAttention(enum.IntEnum):
    """The values of llama.cpp's enum llama_flash_attn_type, and of its patch."""

    NEVER = 0
    ALWAYS = 1
    PROMPTS = 2

    @classmethod
    def of(cls, flash_attn: object, type_k: int | None = None, type_v: int | None = None) -> FlashAttention:
        """What `flash_attn` asks for: True, False, or None (PROMPTS, where keys and values are kept in F16, as they are unless
        `type_k` and `type_v` say otherwise).

        Raises UsageError for anything else.
        """
        if flash_attn is None:
            return cls.PROMPTS if type_k in (None, _F16) and type_v in (None, _F16) else cls.NEVER
        if flash_attn not in (False, True):
            raise UsageError(f"flash_attn is True, False, or None for prompts only, not {flash_attn!r}.")
        return cls.ALWAYS if flash_attn else cls.NEVER

    @property
    def asked(self) -> bool | None:
        """The `flash_attn` that asks for it."""
        return None if self is self.PROMPTS else self is self.ALWAYS

    def computes(self, n_tokens: int) -> bool:
        """Whether a pass of so many tokens is computed with it."""
        return self is self.ALWAYS or (self is self.PROMPTS and n_tokens >= LEAST)
